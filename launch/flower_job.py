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
from typing import Any

from absl import flags, logging

from fmfl_jax.deploy.client import ClientSide
from fmfl_jax.deploy.fleet import Link
from fmfl_jax.deploy.job import (
    OwnText,
    cross_device_side,
    language_model_side,
    own_text_refusals,
    shared_settings,
)
from fmfl_jax.deploy.secure import SECAGG, SECAGG_PLUS, SecureProtocol, secagg
from fmfl_jax.deploy.server import on_nodes, refusals, secagg_plus_refusals
from fmfl_jax.experiment.build.classification import make_task
from fmfl_jax.experiment.config.case_study import CaseStudyConfig
from fmfl_jax.experiment.loop.records import write_json
from launch import app
from launch.flower_processes import end_when_free

COMMANDS = ("launch.federated", "launch.cross_device")

_SECURE_PROTOCOL = flags.DEFINE_enum(
    "secure_protocol",
    SECAGG,
    [SECAGG, SECAGG_PLUS],
    "Of --privacy=secure, the same on server and nodes: secagg is this project's (Bonawitz et al., 2017; a client is a "
    "participant), secagg_plus is Flower's (Bell et al., 2020; a node is one).",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerJob:
    """What launch.flower_server leaves for its ServerApp. words: the simulator's command. timeout_s, wait_s: see
    `on_nodes`. log: the file that lines go to. status: the file that says at the end how it went. verify: the file of
    the clients' public keys, None without keys. lock: held by launch.flower_server, with which the ServerApp ends.
    secure_protocol: the flag of this name."""

    words: list[str]
    timeout_s: float
    wait_s: float
    log: str
    status: str
    lock: str
    verify: str | None
    secure_protocol: str


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


def secure_protocol() -> str:
    """--secure_protocol."""
    return _SECURE_PROTOCOL.value


def configs_of(module) -> tuple:
    """The command's configurations; the last one has the federation."""
    return (module.config_from_flags(),) if module.__name__ == "launch.federated" else module.configs_from_flags()


def checked_settings(module, secure_protocol: str) -> dict:
    """What both sides must agree on. Raises ValueError for what needs the simulator, or another protocol."""
    configs = configs_of(module)
    config = configs[-1]
    for reason in refusals(config.federation, config.network):
        raise ValueError(reason)
    if isinstance(config, CaseStudyConfig) and config.model_parallel != 1:
        raise ValueError(f"model_parallel={config.model_parallel} needs the simulator: a node has the whole base")
    settings: dict[str, Any] = {"secure_protocol": secure_protocol}
    if secure_protocol == SECAGG_PLUS:
        for reason in secagg_plus_refusals(config.federation):
            raise ValueError(reason)
    for each in configs:
        settings |= shared_settings(each)
    return json.loads(json.dumps(settings))  # as it reads back at the other side: lists for tuples


def num_clients(words: list[str]) -> int:
    """Of a job."""
    parse(words)
    return flags.FLAGS.num_clients


def client_side(
    words: list[str], directory: pathlib.Path, say: Callable[[str], None], own: OwnText | None
) -> ClientSide:
    """A node's half of the job. own: the text of the node's clients; None: their part of the job's."""
    module = parse(words)
    settings = checked_settings(module, secure_protocol())
    if module.__name__ == "launch.federated":
        config = module.config_from_flags()
        for reason in () if own is None else own_text_refusals(config.federation, own):
            raise ValueError(reason)
        return language_model_side(config, settings, directory, say, own)
    if own is not None:
        raise ValueError(f"node_text={own.path}: {module.__name__} trains on the rows of its task")
    task_config, config = module.configs_from_flags()
    return cross_device_side(config, *make_task(task_config), settings)


def verify_keys(path: str) -> dict[int, bytes]:
    """Of launch.flower_keys' file."""
    read = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    return {int(client): bytes.fromhex(key) for client, key in read.items()}


def protocol_of(job: ServerJob, module, plus: Callable[..., SecureProtocol]) -> SecureProtocol | None:
    """The protocol of secure aggregation; None where this project's has no keys. plus: see `run_server`."""
    if job.secure_protocol == SECAGG_PLUS:
        fed = configs_of(module)[-1].federation
        return plus(clip=fed.secure_clip, bits=fed.secure_bits)
    return None if job.verify is None else secagg(verify_keys(job.verify))


def run_server(path: str, link: Link, plus: Callable[..., SecureProtocol]) -> None:
    """The server's half, as the ServerApp runs it: the simulator's command with its clients elsewhere. plus(clip=,
    bits=): Flower's SecAgg+ over this link (only its environment has it)."""
    job = ServerJob(**json.loads(pathlib.Path(path).read_text(encoding="utf-8")))
    end_when_free(pathlib.Path(job.lock))
    logging.set_verbosity(logging.ERROR)
    with open(job.log, "a", buffering=1, encoding="utf-8") as log, contextlib.redirect_stdout(log):
        try:
            module = parse(job.words)
            settings = checked_settings(module, job.secure_protocol)
            module.main(
                on_nodes(
                    link,
                    settings,
                    has_base=module.__name__ == "launch.federated",
                    timeout_s=job.timeout_s,
                    wait_s=job.wait_s,
                    secure=protocol_of(job, module, plus),
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
