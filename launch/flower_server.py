"""The server of a federation on real machines: a simulator's command with its clients on Flower's nodes.

  python -m launch.flower_server --host=0.0.0.0 --keys=keys/server \\
      -- launch.federated --algorithm=fedprox --proximal=0.01 --num_clients=4 --out=runs/prox

starts Flower's SuperLink, waits for all clients (launch.flower_node on the other machines), runs the rounds, writes the
report of the command after -- into its --out, and stops the SuperLink. The same command goes on from the last round
after a stop. Without --keys nothing is encrypted: for tests on one machine.
"""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import subprocess
import time

from absl import flags

from fmfl_jax.experiment.loop.records import write_json
from launch import app, flower_job
from launch.flower_processes import APP, environment, held, last_line, program, running, size_of, wait_for_port

_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0 for all.")
_PORT = flags.DEFINE_integer("port", 9092, "Port for nodes.", lower_bound=1, upper_bound=65535)
_KEYS = flags.DEFINE_string("keys", None, "The server's folder of launch.flower_keys; else nothing is encrypted.")
_TIMEOUT = flags.DEFINE_float(
    "round_timeout_s", 600.0, "A round closes with the clients that answered by then.", lower_bound=1.0
)
_WAIT = flags.DEFINE_float("wait_s", 600.0, "How long to wait for all clients at the start.", lower_bound=0.0)


def connection(home: pathlib.Path, address: str, keys: pathlib.Path | None) -> None:
    """Flower's configuration of a connection named "here"."""
    home.mkdir(parents=True, exist_ok=True)
    secured = "insecure = true" if keys is None else f'root-certificates = "{(keys / "ca.pem").absolute()}"'
    text = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{address}"\n{secured}\n'
    (home / "config.toml").write_text(text, encoding="utf-8")


def superlink_command(keys: pathlib.Path | None) -> list[str]:
    """flower-superlink as the flags say."""
    command = [program("flower-superlink"), "--host", _HOST.value, "--port", str(_PORT.value)]
    command.append("--disable-runtime-dependency-installation")
    if keys is None:
        return [*command, "--insecure"]
    certificates = {"certfile": "server.pem", "keyfile": "server.key", "ca-certfile": "ca.pem"}
    for name, file in certificates.items():
        if not (keys / file).is_file():
            raise ValueError(f"--keys={keys} has no {file}: expected the server's folder of launch.flower_keys")
        command += [f"--ssl-{name}", str(keys / file)]
    return [*command, "--enable-supernode-auth"]


def flwr(*words: str) -> None:
    """One call of Flower's command line, in this process: to start one would cost seconds of imports each time. Raises
    ValueError with what it said where it fails."""
    from flwr.cli.app import app as command_line  # pyright: ignore[reportMissingImports]

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            command_line([*words], standalone_mode=False)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and not error.code:
            return
        text = " ".join(f"{said.getvalue()} {error}".split())
        raise ValueError(f"flwr {words[0]} failed: {text[-300:]}") from None


def follow(log: pathlib.Path, status: pathlib.Path, superlink: subprocess.Popen, superlink_log: pathlib.Path) -> None:
    """Prints the job's lines until it ends. Raises ValueError for its error, or where the SuperLink ends first."""
    with open(log, encoding="utf-8") as lines:
        while True:
            ended = status.exists()
            for line in lines:
                app.say(line.rstrip("\n"))
            if ended:
                break
            if superlink.poll() is not None:
                raise ValueError(f"flower-superlink ended: {last_line(superlink_log)}; the same command goes on")
            time.sleep(0.2)
    error = json.loads(status.read_text(encoding="utf-8"))["error"]
    if error:
        raise ValueError(error)


def serve(words: list[str], place: pathlib.Path, lock: pathlib.Path) -> None:
    """SuperLink, nodes' keys and the job, until it ends."""
    keys = None if _KEYS.value is None else pathlib.Path(_KEYS.value)
    home, log, status, superlink_log = place / "home", place / "log.txt", place / "status.json", place / "superlink.log"
    reach = "127.0.0.1" if _HOST.value == "0.0.0.0" else _HOST.value
    connection(home, f"{reach}:{_PORT.value}", keys)
    status.unlink(missing_ok=True)
    log.write_text("", encoding="utf-8")
    job = flower_job.ServerJob(
        words=words,
        timeout_s=_TIMEOUT.value,
        wait_s=_WAIT.value,
        log=str(log),
        status=str(status),
        lock=str(lock),
        verify=None if keys is None else str((keys / "verify.json").absolute()),
        secure_protocol=flower_job.secure_protocol(),
    )
    write_json(place / "job.json", dataclasses.asdict(job))
    env = environment(home)
    os.environ.update(env)  # before flwr is imported here
    start = size_of(superlink_log)
    with running(superlink_command(keys), env, superlink_log) as superlink:
        wait_for_port(reach, _PORT.value, superlink, superlink_log, start)
        for public in sorted((keys / "nodes").glob("*.pub")) if keys is not None else []:
            flwr("supernode", "register", str(public), "here")
        app.say(f"listening at {_HOST.value}:{_PORT.value}; logs: {place}")
        flwr("run", str(APP), "here", "--run-config", f'job="{place / "job.json"}"')
        follow(log, status, superlink, superlink_log)


def main(words: list[str]):
    module = flower_job.parse(words)
    flower_job.checked_settings(module, flower_job.secure_protocol())
    out = pathlib.Path(flags.FLAGS.out)
    place = (out / "flower").absolute()
    place.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(place / "lock"))
        except BlockingIOError:
            raise ValueError(f"--out={out}: another launch.flower_server goes on there") from None
        serve(words, place, place / "lock")


if __name__ == "__main__":
    app.run(main, flower_job, takes_words=True)
