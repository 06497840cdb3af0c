"""From a simulator's configuration to its client side: what a node needs of it, and what both sides must agree on."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from fmfl_jax.data.classification import Task
from fmfl_jax.deploy.client import ClientSide
from fmfl_jax.deploy.fingerprint import fingerprint
from fmfl_jax.experiment.base import deal, prepare_base, quantized
from fmfl_jax.experiment.build.language_model import ClientData
from fmfl_jax.experiment.case_study import form_setup
from fmfl_jax.experiment.config.case_study import CaseStudyConfig
from fmfl_jax.experiment.config.cross_device import CrossDeviceConfig
from fmfl_jax.experiment.cross_device import prepare
from fmfl_jax.experiment.loop.records import settings_of
from fmfl_jax.models.classifiers import Model
from fmfl_jax.parallel import replicate

# Where files lie, and what only the server does: each machine its own.
_OWN = ("checkpoint", "tokenizer", "text.train", "text.eval", "text.calib", "text.max_eval_windows")
_SERVERS = ("rounds.num_rounds", "rounds.eval_every", "rounds.checkpoint_every", "num_rounds", "eval_every")


def language_model_side(
    config: CaseStudyConfig, settings: dict[str, Any], directory: pathlib.Path, say: Callable[[str], None]
) -> ClientSide:
    """The clients of `run_case_study` with one way of fine-tuning and one format of the weights."""
    base = prepare_base(config, directory, say)
    data = ClientData(base.train.windows, deal(config.partition, base.train, seed=config.rounds.seed))
    (name,), (weights,) = config.fine_tuning, config.weights
    formed = quantized(config, base, weights, say)
    setup = form_setup(config, formed, data, replicate(formed.params, copy=False), name)
    view = setup.view
    return ClientSide(
        setup.federation.round,
        view.trainable,
        view.frozen,
        setup.source,
        config.rounds.seed,
        settings,
        fingerprint(view.frozen),
    )


def cross_device_side(config: CrossDeviceConfig, model: Model, task: Task, settings: dict[str, Any]) -> ClientSide:
    """The clients of `run_cross_device`. There is no base: all parameters are trained, and sent."""
    ready = prepare(config, model, task)
    rows = replicate(ready.rows, copy=False)
    return ClientSide(ready.federation.round, ready.params, rows, ready.source, config.seed, settings, "")


def shared_settings(config: Any) -> dict[str, Any]:
    """{dotted name: value} of a configuration, without each machine's own."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any):
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{prefix}{name}.", inner)
        else:
            flat[prefix.removesuffix(".")] = value

    walk("", settings_of(config))
    own = (*_OWN, *_SERVERS, "checkpoint_every", "train_text", "test_text")
    assert dataclasses.is_dataclass(config)
    return {name: value for name, value in flat.items() if name not in own}
