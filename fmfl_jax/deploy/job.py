"""From a simulator's configuration to its client side: what a node needs of it, and what both sides must agree on."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from fmfl_jax.data.batches import token_windows
from fmfl_jax.data.classification import Task
from fmfl_jax.data.corpora import load_documents
from fmfl_jax.data.tokenizers import Tokenizer
from fmfl_jax.deploy.client import ClientSide
from fmfl_jax.deploy.fingerprint import fingerprint
from fmfl_jax.experiment.base import deal, prepare_base, quantized
from fmfl_jax.experiment.build.language_model import ClientData, make_source
from fmfl_jax.experiment.case_study import form_setup
from fmfl_jax.experiment.config.case_study import CaseStudyConfig
from fmfl_jax.experiment.config.cross_device import CrossDeviceConfig
from fmfl_jax.experiment.config.federation import FederationConfig
from fmfl_jax.experiment.cross_device import prepare
from fmfl_jax.experiment.loop.records import settings_of
from fmfl_jax.experiment.methods.selections import Oort
from fmfl_jax.models.classifiers import Model
from fmfl_jax.parallel import replicate

# Where files lie, and what only the server does: each machine its own.
_OWN = ("checkpoint", "tokenizer", "text.train", "text.eval", "text.calib", "text.max_eval_windows")
_SERVERS = ("rounds.num_rounds", "rounds.eval_every", "rounds.checkpoint_every", "num_rounds", "eval_every")


class OwnText(NamedTuple):
    """A text that only this machine has. path: a file, or a folder of text files. clients: whom it is dealt to."""

    path: str
    clients: list[int]


def own_text_refusals(fed: FederationConfig, own: OwnText) -> Iterator[str]:
    """What goes wrong where only a node knows how much text its clients have. Fields are name=value."""
    text = f"node_text={own.path}"
    if "dp_sgd" in fed.privacy:
        yield f"{text} with privacy=dp_sgd: noise and epsilon are of the numbers of windows that everybody knows"
    if "secure" in fed.privacy and not fed.uniform_weights:
        yield f"{text} with privacy=secure needs weighting=uniform: its integers are of a largest weight known to all"
    if isinstance(fed.selection, Oort):
        yield f"{text} with selection=oort: the server ranks clients by the windows that it knows of"


def with_own_text(data: ClientData, config: CaseStudyConfig, tokenizer: Tokenizer, own: OwnText) -> ClientData:
    """The clients' data where those of `own` have its text in place of their part of the common one, dealt among them
    by the configured partition. Raises ValueError where it is not there, or too short for a window of each."""
    try:
        documents = load_documents(own.path)
        text = token_windows(tokenizer, documents, config.text.seq_len, add_bos=True, add_eos=True)
        partition = dataclasses.replace(config.partition, num_clients=len(own.clients))
        dealt = deal(partition, text, seed=config.rounds.seed)
    except (OSError, ValueError) as error:
        raise ValueError(f"node_text={own.path}: {str(error).removeprefix(f'{own.path}: ')}") from None
    indices = list(data.client_indices)
    for client, held in zip(own.clients, dealt):
        indices[client] = len(data.windows) + held
    return ClientData(np.concatenate([data.windows, text.windows]), indices)


def language_model_side(
    config: CaseStudyConfig,
    settings: dict[str, Any],
    directory: pathlib.Path,
    say: Callable[[str], None],
    own: OwnText | None = None,
) -> ClientSide:
    """The clients of `run_case_study` with one way of fine-tuning and one format of the weights. What all sides must
    agree on (the largest weight of secure aggregation, ...) follows from the common text alone."""
    base = prepare_base(config, directory, say)
    data = ClientData(base.train.windows, deal(config.partition, base.train, seed=config.rounds.seed))
    (name,), (weights,) = config.fine_tuning, config.weights
    formed = quantized(config, base, weights, say)
    setup = form_setup(config, formed, data, replicate(formed.params, copy=False), name)
    view, source = setup.view, setup.source
    if own is not None:
        held = with_own_text(data, config, base.tokenizer, own)
        source = make_source(config.federation, config.rounds, held, base.config.vocab_size, server_windows=base.root)
        sizes = [int(held.sizes[client]) for client in own.clients]
        say(f"client {', '.join(map(str, own.clients))} holds {', '.join(map(str, sizes))} windows of {own.path}")
    return ClientSide(
        setup.federation.round,
        view.trainable,
        view.frozen,
        source,
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
