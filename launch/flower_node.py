"""A node: some clients of a federation on this machine, by Flower's SuperNode.

  python -m launch.flower_node --superlink=fl.example.org:9092 --clients=0,2 --keys=keys/node0 --state=node0 \\
      -- launch.federated --algorithm=fedprox --proximal=0.01 --num_clients=4

After -- stands the command that launch.flower_server runs; paths of checkpoints and texts are this machine's own. The
node keeps the weights and the compiled programs, so each of Flower's messages costs only its training. Without --keys
nothing is encrypted: for tests on one machine. A SuperNode that ends is started again; Ctrl-C ends the node.

With --node_text the clients train on a text that never leaves this machine; the server hears how many windows each has.

Where no checkpoint is here, or another one than the server's, --base_url=http://HOST:8765/ --base_key=publisher.pem.pub
fetch it from `launch.deliver serve` into --state (a stopped fetch goes on); what is here already is not fetched.
"""

import json
import pathlib
import tempfile
import time

from absl import flags

from fmfl_jax.deploy import channel
from fmfl_jax.deploy.base import delivered_base
from fmfl_jax.deploy.client import Node
from fmfl_jax.deploy.job import OwnText
from fmfl_jax.deploy.secure import SECAGG_PLUS, Identities
from fmfl_jax.transport.weights.manifest import read_public_key
from launch import app, flower_job
from launch.flower_processes import environment, free_port, program, reason, running, size_of

_SUPERLINK = flags.DEFINE_string("superlink", "127.0.0.1:9092", "host:port of launch.flower_server.")
_CLIENTS = flags.DEFINE_list("clients", [], "Numbers of the clients on this machine; default: those of --keys.")
_KEYS = flags.DEFINE_string("keys", None, "This node's folder of launch.flower_keys; without it nothing is encrypted.")
_STATE = flags.DEFINE_string("state", "runs/node", "Folder of what the clients keep, and of logs.")
_BASE_URL = flags.DEFINE_string(
    "base_url", None, "Where launch.deliver serves the base, fetched if the job's --checkpoint is not the same."
)
_BASE_KEY = flags.DEFINE_string("base_key", None, "Of --base_url: the publisher's key, a file or 64 hex digits.")
_NODE_TEXT = flags.DEFINE_string(
    "node_text",
    None,
    "Text that only this machine has, a file or a folder: its clients train on it in place of their part of the job's "
    "--train_text, dealt among them by --partition.",
)

_AGAIN_S = 3.0


def client_numbers(given: list[str], keys: pathlib.Path | None) -> list[int]:
    """--clients, else whose signing keys are there."""
    if not given and keys is not None:
        return sorted(map(int, json.loads((keys / "signing.json").read_text(encoding="utf-8"))))
    if not given or any(not number.isdecimal() for number in given):
        raise ValueError(f"--clients={','.join(given)}: expected numbers of clients")
    return [int(number) for number in given]


def identities_of(keys: pathlib.Path) -> Identities:
    """The clients' keys in a node's folder."""
    read = lambda name: json.loads((keys / name).read_text(encoding="utf-8"))
    return Identities(
        *({int(c): bytes.fromhex(key) for c, key in read(f).items()} for f in ("verify.json", "signing.json"))
    )


def with_base(words: list[str], state: pathlib.Path) -> list[str]:
    """The job with the checkpoint that --base_url delivers, if it is given. Raises ValueError for wrong flags."""
    module, url, given = flower_job.parse(words), _BASE_URL.value, _BASE_KEY.value
    if url is None and given is None:
        return words
    if url is None or given is None:
        raise ValueError("--base_url and --base_key go together")
    if module.__name__ != "launch.federated":
        raise ValueError(f"--base_url={url}: {module.__name__} trains all parameters, it has no base")
    try:
        key = read_public_key(given)
    except ValueError as error:
        raise ValueError(f"--base_key={error}") from None
    return [*words, f"--checkpoint={delivered_base(url, key, flags.FLAGS.checkpoint, state / 'base', app.say)}"]


def main(words: list[str]):
    keys = None if _KEYS.value is None else pathlib.Path(_KEYS.value)
    command = [program("flower-supernode"), "--superlink", _SUPERLINK.value, "--port", str(free_port())]
    if keys is None:
        command.append("--insecure")
    else:
        if not (keys / "node.key").is_file():
            raise ValueError(f"--keys={keys} has no node.key: expected a node's folder of launch.flower_keys")
        command += ["--root-certificates", str(keys / "ca.pem"), "--auth-supernode-private-key", str(keys / "node.key")]
    state, clients = pathlib.Path(_STATE.value), client_numbers(_CLIENTS.value, keys)
    state.mkdir(parents=True, exist_ok=True)
    identities = None if keys is None else identities_of(keys)
    words = with_base(words, state)
    own = None if _NODE_TEXT.value is None else OwnText(_NODE_TEXT.value, clients)
    side, plus = flower_job.client_side(words, state, app.say, own), flower_job.secure_protocol() == SECAGG_PLUS
    node = Node(side, clients, state / "clients", identities, for_secagg_plus=plus)
    with tempfile.TemporaryDirectory(prefix="fmfl_node_") as folder:
        path = str(pathlib.Path(folder) / "channel")
        channel.serve(path, node.answer)
        log = state / "supernode.log"
        app.say(f"client {', '.join(map(str, clients))} at {_SUPERLINK.value}; log: {log}")
        while True:  # a SuperNode ends where the SuperLink does not know it yet, or not any more
            size = size_of(log)
            with running(
                [*command, "--node-config", f'channel="{path}"'], environment(state / "flower"), log
            ) as supernode:
                status = supernode.wait()
            app.say(f"flower-supernode ended with status {status} ({reason(log, size)}) and is started again")
            time.sleep(_AGAIN_S)


if __name__ == "__main__":
    app.run(main, flower_job, takes_words=True)
