"""Small models by the thousand: the same round loop over clients of unequal numbers of rows."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from fmfl_jax.data.classification import Task
from fmfl_jax.data.shards import Shards
from fmfl_jax.experiment.build.classification import (
    hold_out_rows,
    local_steps,
    make_client_evaluator,
    make_job,
    make_learner,
    make_source,
    pooled,
    rows_of,
)
from fmfl_jax.experiment.build.federation import Federation, make_federation
from fmfl_jax.experiment.config.client_counts import client_counts
from fmfl_jax.experiment.config.cross_device import CrossDeviceConfig
from fmfl_jax.experiment.config.federation import FederationConfig
from fmfl_jax.experiment.config.rounds import RoundsConfig
from fmfl_jax.experiment.config.server import ServerConfig
from fmfl_jax.experiment.loop.participation import Record
from fmfl_jax.experiment.loop.rounds import Callbacks, Elsewhere, RoundView, Source, run_rounds
from fmfl_jax.fed.algorithms.fed_opt import Penalty
from fmfl_jax.fed.core.execution import default_mode, execution_of
from fmfl_jax.fed.core.types import Aggregator, Params, ServerState
from fmfl_jax.models.classifiers import Model, classification_loss, make_evaluator
from fmfl_jax.parallel import local_copy

_HELD_OUT, _MOST_HELD_OUT = 0.2, 32  # of a client's rows, to evaluate its personal model on


class CrossDeviceResult(NamedTuple):
    """state: after the last round. history: one record per round. execution: the mode that ran."""

    state: ServerState
    history: list[Record]
    execution: str


class Prepared(NamedTuple):
    """What the rounds are made of. rows: {"x", "y"} of all clients. held: each client's rows that it is evaluated on,
    where it has a personal model. test: figures of parameters on the task's test rows. execution: the mode."""

    rounds: RoundsConfig
    federation: Federation
    params: Params
    rows: dict[str, np.ndarray]
    source: Source
    held: Shards | None
    test: Callable[[Params], Record]
    execution: str


def prepare(
    config: CrossDeviceConfig,
    model: Model,
    task: Task,
    aggregator: Aggregator | None = None,
    penalty: Penalty | None = None,
) -> Prepared:
    """From a configuration to what the rounds are made of; see `run_cross_device`."""
    if config.cohort_size > len(task.shards.sizes):
        raise ValueError(f"cohort_size is {config.cohort_size}, but there are {len(task.shards.sizes)} clients")
    client_counts(config.federation, num_clients=len(task.shards.sizes), cohort_size=config.cohort_size)
    shards, held = task.shards, None
    if config.federation.keeps_personal_models:
        shards, held = hold_out_rows(shards, _HELD_OUT, most=_MOST_HELD_OUT, seed=config.seed)
        task = task._replace(shards=shards)
    params, rounds = model.init(jax.random.key(config.seed)), config.rounds(local_steps(config, shards))
    mode = mode_of(config, model, task, params)
    test = make_evaluator(model, *task.test)
    federation = make_federation(
        config.federation,
        rounds,
        config.server,
        make_learner(model, params, config.client_lr)._replace(penalty=penalty),
        sizes=shards.sizes,
        execution=execution_of(mode),
        job=None if config.network is None else make_job(config, config.network, model, params, task),
        aggregator=aggregator,
        loss=lambda params, frozen: test(local_copy(params))["nll"],
    )
    source = make_source(config, shards)
    return Prepared(rounds, federation, params, rows_of(config, task), source, held, test, mode)


def run_cross_device(
    config: CrossDeviceConfig,
    model: Model,
    task: Task,
    directory: str | pathlib.Path,
    *,
    label: str = "rounds",
    aggregator: Aggregator | None = None,
    penalty: Penalty | None = None,
    on_evaluation: Callable[[Record], None] | None = None,
    say: Callable[[str], None] = print,
    elsewhere: Elsewhere | None = None,
) -> CrossDeviceResult:
    """Runs the rounds of any (init, apply) model; see `run_rounds`.

    Where the clients keep personal models, a fifth of each client's rows is held out to evaluate them on.
    aggregator: in place of the configured one, where the server has data of its own (fed/aggregators/distillation.py).
    penalty: a further part of the clients' loss, for plain FedAvg.
    say: gets a line for each round that dropped all its clients. elsewhere: see `run_rounds`.
    Raises ValueError where cohort_size exceeds the clients, and where a share of clients above 0 is none (see
    `client_counts`).
    """
    ready = prepare(config, model, task, aggregator, penalty)
    federation, held = ready.federation, ready.held
    algorithm = federation.round.algorithm

    def accuracy(view: RoundView) -> Record:
        return ready.test(local_copy(algorithm.shared(view.state.params)))

    personal_models = () if held is None else (make_client_evaluator(model, algorithm, held),)
    result = run_rounds(
        ready.rounds,
        federation.round,
        ready.params,
        ready.rows,
        ready.source,
        federation.schedule,
        Callbacks(
            after_round=federation.after_round,
            at_evaluation=(accuracy, *personal_models, *federation.at_evaluation),
            on_evaluation=on_evaluation,
            say=say,
        ),
        directory=directory,
        label=label,
        elsewhere=elsewhere,
    )
    return CrossDeviceResult(result.state, result.history, ready.execution)


def mode_of(config: CrossDeviceConfig, model: Model, task: Task, params: Params) -> str:
    """The configured execution, or the best one known for this model."""
    if config.execution != "auto":
        return config.execution
    batch = {
        "index": jax.ShapeDtypeStruct((config.batch_size,), np.int32),
        "mask": jax.ShapeDtypeStruct((config.batch_size,), bool),
    }
    rows = {"x": task.train.x, "y": task.train.y}
    return default_mode(jax.value_and_grad(classification_loss(model)), params, rows, batch)


def run_centralized(
    config: CrossDeviceConfig,
    model: Model,
    task: Task,
    directory: str | pathlib.Path,
    *,
    epochs: int,
    learning_rate: float,
    on_evaluation: Callable[[Record], None] | None = None,
) -> CrossDeviceResult:
    """The same model and SGD in the same batches with all rows in one place: one client, an epoch a round."""
    config = dataclasses.replace(
        config,
        num_rounds=epochs,
        cohort_size=1,
        local_epochs=1,
        client_lr=learning_rate,
        federation=FederationConfig(),
        server=ServerConfig(),
        network=None,
        eval_every=1,
        checkpoint_every=epochs,
    )
    return run_cross_device(config, model, pooled(task), directory, label="centralized", on_evaluation=on_evaluation)
