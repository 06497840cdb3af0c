"""The simulator's command as a job for real machines: what stands after "--" of launch.flower_server and flower_node.

launch.federated FLAGS ...      language models
launch.cross_device FLAGS ...   small models
"""

import contextlib
import dataclasses
import importlib
import json
import pathlib
from collections.abc import Callable

from absl import flags, logging

from fmfl_jax.deploy.client import ClientSide
from fmfl_jax.deploy.fleet import Link
from fmfl_jax.deploy.job import cross_device_side, language_model_side, shared_settings
from fmfl_jax.deploy.server import on_nodes, refusals
from fmfl_jax.experiment.build.classification import make_task
from fmfl_jax.experiment.config.case_study import CaseStudyConfig
from fmfl_jax.experiment.loop.records import write_json
from launch import app
from launch.flower_processes import end_when_free

COMMANDS = ("launch.federated", "launch.cross_device")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerJob:
    """What launch.flower_server leaves for its ServerApp. words: the simulator's command. timeout_s, wait_s: see
    `on_nodes`. log: the file that lines go to. status: the file that says at the end how it went. verify: the file of
    the clients' public keys, None without keys. lock: held by launch.flower_server, with which the ServerApp ends."""

    words: list[str]
    timeout_s: float
    wait_s: float
    log: str
    status: str
    lock: str
    verify: str | None


def parse(words: list[str]):
    """The command's module, with its flags parsed. Raises ValueError for another command or wrong flags."""
    if not words or words[0] not in COMMANDS:
        raise ValueError(f"after -- stands the simulator's command, one of {', '.join(COMMANDS)}, with its flags")
    module = importlib.import_module(words[0])
    try:
        rest = flags.FLAGS(words)
    except flags.Error as error:
        raise ValueError(str(error)) from None
    if len(rest) > 1:
        raise ValueError(f"unexpected argument {rest[1]!r}: options begin with --")
    app.refuse_non_finite_flags()
    return module


def checked_settings(module) -> dict:
    """What both sides must agree on. Raises ValueError for what needs the simulator."""
    if module.__name__ == "launch.federated":
        configs = (module.config_from_flags(),)
    else:
        configs = module.configs_from_flags()
    config = configs[-1]
    for reason in refusals(config.federation, config.network):
        raise ValueError(reason)
    if isinstance(config, CaseStudyConfig) and config.model_parallel != 1:
        raise ValueError(f"model_parallel={config.model_parallel} needs the simulator: a node has the whole base")
    settings = {}
    for each in configs:
        settings |= shared_settings(each)
    return json.loads(json.dumps(settings))  # as it reads back at the other side: lists for tuples


def num_clients(words: list[str]) -> int:
    """Of a job."""
    parse(words)
    return flags.FLAGS.num_clients


def client_side(words: list[str], directory: pathlib.Path, say: Callable[[str], None]) -> ClientSide:
    """A node's half of the job."""
    module = parse(words)
    settings = checked_settings(module)
    if module.__name__ == "launch.federated":
        return language_model_side(module.config_from_flags(), settings, directory, say)
    task_config, config = module.configs_from_flags()
    return cross_device_side(config, *make_task(task_config), settings)


def verify_keys(path: str) -> dict[int, bytes]:
    """Of launch.flower_keys' file."""
    read = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    return {int(client): bytes.fromhex(key) for client, key in read.items()}


def run_server(path: str, link: Link) -> None:
    """The server's half, as the ServerApp runs it: the simulator's command with its clients elsewhere."""
    job = ServerJob(**json.loads(pathlib.Path(path).read_text(encoding="utf-8")))
    end_when_free(pathlib.Path(job.lock))
    logging.set_verbosity(logging.ERROR)
    with open(job.log, "a", buffering=1, encoding="utf-8") as log, contextlib.redirect_stdout(log):
        try:
            module = parse(job.words)
            settings = checked_settings(module)
            module.main(
                on_nodes(
                    link,
                    settings,
                    has_base=module.__name__ == "launch.federated",
                    timeout_s=job.timeout_s,
                    wait_s=job.wait_s,
                    verify=None if job.verify is None else verify_keys(job.verify),
                    say=app.say,
                )
            )
            error = None
        except (ValueError, OSError) as caught:
            error = app.with_flags(" ".join(str(caught).split()))
        except BaseException as caught:
            write_json(pathlib.Path(job.status), {"error": f"{type(caught).__name__}: {caught}"})
            raise
    write_json(pathlib.Path(job.status), {"error": error})
