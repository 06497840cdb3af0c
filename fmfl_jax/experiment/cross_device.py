"""Small models by the thousand: cohorts of unequal clients, rounds, evaluation, checkpoints, and a report.

The rows of all clients lie on the device once; a round sends row numbers. Memory is the rows plus one cohort, whatever
the number of clients.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Any, Callable, NamedTuple

import jax
import matplotlib

matplotlib.use("Agg")  # files only
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

from fmfl_jax.data.batches import cohort as draw_cohort
from fmfl_jax.experiment.checkpointing import open_checkpoints, restore_state, save_state
from fmfl_jax.experiment.client_store import ClientStore
from fmfl_jax.experiment.records import read_history, write_history, write_json
from fmfl_jax.fed.algorithm import Cohort, Delivery, FederatedAlgorithm, ServerState
from fmfl_jax.fed.execution import MODES, default_mode, execute_fed_opt
from fmfl_jax.fed.server_optimizers import fed_adagrad, fed_adam, fed_yogi
from fmfl_jax.fed.sharding import replicate, shard_cohort, spread
from fmfl_jax.small.batches import Shards, epoch_batches, max_steps
from fmfl_jax.small.data import Task, image_task, linear_task, read_labelled_text, text_task
from fmfl_jax.small.models import (Model, classification_grad, linear_classifier, make_evaluator, small_cnn,
                                   text_classifier)

ALGORITHMS = ("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad")
TASKS = ("linear", "images", "agnews")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What the clients learn. "linear" and "images" are made from the seed; "agnews" reads two files of text<TAB>label.

    alpha: of the Dirichlet distribution over labels; the linear task has its own unequal clients.
    """

    name: str = "linear"
    train_text: str | None = None
    test_text: str | None = None
    num_clients: int = 1000
    alpha: float = 0.3
    seed: int = 0

    def __post_init__(self):
        if self.name not in TASKS:
            raise ValueError(f"task is {self.name!r}: expected one of {', '.join(TASKS)}")
        if self.num_clients < 1:
            raise ValueError(f"num_clients must be at least 1, got {self.num_clients}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}")
        given = [name for name in ("train_text", "test_text") if getattr(self, name) is not None]
        if self.name == "agnews" and len(given) < 2:
            raise ValueError("task agnews needs train_text and test_text, files of lines text<TAB>label")
        if self.name != "agnews" and given:
            raise ValueError(f"{given[0]} is for task agnews: task {self.name} makes its data")

    def make(self) -> tuple[Model, Task]:
        """The model and the data."""
        if self.name == "linear":
            return linear_classifier(64, 10), linear_task(self.num_clients, num_features=64, num_test=5000, seed=self.seed)
        if self.name == "images":
            task = image_task(self.num_clients, num_rows=max(10_000, 10 * self.num_clients), alpha=self.alpha,
                              num_test=2000, seed=self.seed)
            return small_cnn(28, 10), task
        num_buckets = 2**14
        task = text_task(read_labelled_text(self.train_text), read_labelled_text(self.test_text), self.num_clients,
                         alpha=self.alpha, num_buckets=num_buckets, max_ngrams=128, seed=self.seed)
        return text_classifier(num_buckets, 4), task


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossDeviceConfig:
    """A run. In each round cohort_size clients, drawn at random, take local_epochs of SGD over their own rows.

    server_lr: None is 1 for fedavg, fedprox and fedavgm (momentum .9), .01 for the adaptive ones, which are Reddi's.
    proximal: FedProx's mu, of fedprox only; None is .1. execution: "auto" (fed/execution.py, `default_mode`) or a mode.
    eval_every, checkpoint_every: in rounds; the last round is always evaluated and kept.
    """

    num_rounds: int = 100
    cohort_size: int = 50
    batch_size: int = 10
    local_epochs: int = 1
    client_lr: float = 0.1
    algorithm: str = "fedavg"
    server_lr: float | None = None
    proximal: float | None = None
    execution: str = "auto"
    seed: int = 0
    eval_every: int = 10
    checkpoint_every: int = 50

    def __post_init__(self):
        for name in ("num_rounds", "cohort_size", "batch_size", "local_epochs", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm is {self.algorithm!r}: expected one of {', '.join(ALGORITHMS)}")
        if self.execution not in ("auto", *MODES):
            raise ValueError(f"execution is {self.execution!r}: expected one of auto, {', '.join(MODES)}")
        if self.client_lr <= 0 or (self.server_lr is not None and self.server_lr <= 0):
            raise ValueError("client_lr and server_lr must be above 0")
        if self.proximal is not None and self.algorithm != "fedprox":
            raise ValueError(f"proximal belongs to fedprox, got algorithm {self.algorithm}")
        if self.proximal is not None and self.proximal < 0:
            raise ValueError(f"proximal must be at least 0, got {self.proximal}")

    def server_optimizer(self) -> optax.GradientTransformation:
        """What the mean delta goes to."""
        adaptive = {"fedadam": fed_adam, "fedyogi": fed_yogi, "fedadagrad": fed_adagrad}
        if self.algorithm in adaptive:
            return adaptive[self.algorithm](0.01 if self.server_lr is None else self.server_lr)
        momentum = 0.9 if self.algorithm == "fedavgm" else None
        return optax.sgd(1.0 if self.server_lr is None else self.server_lr, momentum)

    def mu(self) -> float:
        """FedProx's mu, 0 for other algorithms."""
        if self.algorithm != "fedprox":
            return 0.0
        return 0.1 if self.proximal is None else self.proximal


class CrossDeviceResult(NamedTuple):
    """state: after the last round. history: one dict per round. execution: the mode that ran."""

    state: ServerState
    history: list[dict[str, Any]]
    execution: str


def run_cross_device(config: CrossDeviceConfig, model: Model, task: Task, directory: str | pathlib.Path, *,
                     delivery: Delivery = Delivery(), extras: dict | None = None, label: str = "rounds",
                     on_evaluation: Callable[[dict], None] | None = None) -> CrossDeviceResult:
    """Runs config.num_rounds rounds of any (init, apply) model, or what is left of them after the checkpoint in
    `directory`.

    Everything random follows from (seed, round, client), so a run that was stopped and continued ends with the same
    bits. history is kept in directory/metrics.jsonl; round 0 is the model before training. `round_s` is the time
    from one evaluation or checkpoint to the next, divided by the rounds, which are not waited for one by one; the first
    round, which compiles, has none.

    Args:
      delivery: any uplink, attack and aggregator, but for those that need data of the server's own.
      extras: {name: array [num_clients, ...]} for Cohort.extras, such as "malicious".
    Raises ValueError for such an aggregator, and where cohort_size exceeds the clients.
    """
    _check(config, task, delivery)
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    params = model.init(jax.random.key(config.seed))
    grad_fn = classification_grad(model)
    frozen = replicate({"x": task.train.x, "y": task.train.y}, copy=False)
    num_steps = max_steps(task.shards, batch_size=config.batch_size, epochs=config.local_epochs)
    mode = config.execution if config.execution != "auto" else mode_for(grad_fn, params, frozen, config.batch_size)
    execution = execute_fed_opt(mode, grad_fn, optax.sgd(config.client_lr), config.server_optimizer(),
                                proximal=config.mu(), delivery=delivery)
    state = replicate(execution.algorithm.init(params, config.seed))
    evaluate = make_evaluator(model, *task.test)

    def evaluated(record: dict):
        record |= evaluate(jax.tree.map(lambda x: x.addressable_data(0), state.params))
        if on_evaluation is not None:
            on_evaluation(record)

    with open_checkpoints(directory / "checkpoints") as checkpoints:
        if (restored := restore_state(checkpoints, state)) is not None:
            start, state = restored
            history = read_history(directory, up_to_round=start)
        else:
            start, history = 0, [{"round": 0}]
            evaluated(history[0])
        store = _open_store(execution.algorithm, params, len(task.shards.sizes), directory, start)
        pending, since = [], None  # rounds under way; when the first of them began, None where it compiles
        for r in tqdm(range(start, config.num_rounds), desc=label, unit="round", initial=start, total=config.num_rounds,
                      disable=None):
            ids = draw_cohort(len(task.shards.sizes), config.cohort_size, round=r, seed=config.seed)
            laid_out = cohort_of(ids, task.shards, r, num_steps=num_steps, seed=config.seed,
                                 batch_size=config.batch_size, epochs=config.local_epochs,
                                 clients_per_pass=execution.clients_per_pass, weigh=delivery.aggregator.weigh,
                                 client_states=() if store is None else store.gather(ids), extras=extras)
            state, metrics, report = execution.round(state, frozen, spread(laid_out))
            if store is not None:
                store.scatter(ids, jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:])[: len(ids)],
                                                report.states))
            pending.append({"round": r + 1} | metrics)
            last = r + 1 == config.num_rounds
            keep, look = last or (r + 1) % config.checkpoint_every == 0, last or (r + 1) % config.eval_every == 0
            if not (keep or look or r == start):
                continue
            records = jax.device_get(pending)  # waits for the rounds
            round_s = None if since is None else (time.perf_counter() - since) / len(pending)
            history += [{k: float(v) for k, v in record.items()} | {"round": record["round"], "round_s": round_s}
                        for record in records]
            if look:
                evaluated(history[-1])
            if keep:
                write_history(directory, history)
                save_state(checkpoints, r + 1, state)
                if store is not None:
                    store.commit(r + 1)
            pending, since = [], time.perf_counter()
    return CrossDeviceResult(state, history, mode)


def mode_for(grad_fn: Callable, params, frozen, batch_size: int) -> str:
    """`default_mode` of a gradient over row numbers."""
    batch = {"index": jax.ShapeDtypeStruct((batch_size,), np.int32), "mask": jax.ShapeDtypeStruct((batch_size,), bool)}
    return default_mode(grad_fn, params, frozen, batch)


def cohort_of(ids: np.ndarray, shards: Shards, r: int, *, num_steps: int, seed: int, batch_size: int, epochs: int,
              clients_per_pass: int | None, weigh: Callable | None = None, client_states=(),
              extras: dict | None = None) -> Cohort:
    """The cohort of these clients in round r, numpy leaves [devices, C, ...]."""
    batches, steps = epoch_batches(shards, ids, round=r, seed=seed, batch_size=batch_size, epochs=epochs,
                                   num_steps=num_steps)
    sizes = shards.sizes[ids].astype(np.float32)
    weights = sizes if weigh is None else np.asarray(weigh(sizes), np.float32)
    of_clients = {name: np.asarray(x)[ids] for name, x in (extras or {}).items()}
    cohort = Cohort(ids.astype(np.int32), weights, batches, client_states=client_states,
                    extras=of_clients | {"num_steps": steps})
    return shard_cohort(cohort, num_devices=jax.device_count(), clients_per_pass=clients_per_pass)


def run_centralized(config: CrossDeviceConfig, model: Model, task: Task, directory: str | pathlib.Path, *, epochs: int,
                    learning_rate: float, on_evaluation: Callable[[dict], None] | None = None) -> CrossDeviceResult:
    """The same model and SGD in the same batches with all rows in one place: one client, an epoch a round."""
    pooled = task._replace(shards=Shards(task.shards.rows, np.asarray([0, len(task.shards.rows)])))
    config = dataclasses.replace(config, num_rounds=epochs, cohort_size=1, local_epochs=1, client_lr=learning_rate,
                                 algorithm="fedavg", server_lr=None, proximal=None, eval_every=1, checkpoint_every=epochs)
    return run_cross_device(config, model, pooled, directory, label="centralized", on_evaluation=on_evaluation)


def write_report(directory: str | pathlib.Path, config: CrossDeviceConfig, task: Task, result: CrossDeviceResult,
                 centralized: CrossDeviceResult | None) -> dict:
    """Writes accuracy.png and row.json and returns the row. round_s: median over the rounds."""
    directory, looks = pathlib.Path(directory), [record for record in result.history if "accuracy" in record]
    sizes = task.shards.sizes
    times = [record["round_s"] for record in result.history[1:] if record["round_s"] is not None]
    row = {"algorithm": config.algorithm, "execution": result.execution, "clients": len(sizes),
           "rows_per_client": {"min": int(sizes.min()), "median": float(np.median(sizes)), "max": int(sizes.max())},
           "rounds": config.num_rounds, "params": sum(x.size for x in jax.tree.leaves(result.state.params)),
           "accuracy_before": looks[0]["accuracy"], "accuracy": looks[-1]["accuracy"], "nll": looks[-1]["nll"],
           "best_accuracy": max(record["accuracy"] for record in looks),
           "centralized_accuracy": None if centralized is None else centralized.history[-1]["accuracy"],
           "best_centralized_accuracy": None if centralized is None else max(r["accuracy"] for r in centralized.history),
           "round_s": float(np.median(times)) if times else None}
    write_json(directory / "row.json", row)
    if jax.process_index() == 0:
        _plot(directory / "accuracy.png", config.algorithm, looks, row["centralized_accuracy"])
    return row


def _plot(path: pathlib.Path, name: str, looks: list[dict], centralized: float | None) -> None:
    """Test accuracy by round, the centralized one as a dashed line."""
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    ax.plot([record["round"] for record in looks], [record["accuracy"] for record in looks],
            marker="." if len(looks) < 30 else None, label=name)
    if centralized is not None:
        ax.axhline(centralized, color="black", linestyle="--", label="all data in one place")
    ax.set(xlabel="round", ylabel="accuracy on the test rows", ylim=(0, 1))
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def _check(config: CrossDeviceConfig, task: Task, delivery: Delivery) -> None:
    if config.cohort_size > len(task.shards.sizes):
        raise ValueError(f"cohort_size is {config.cohort_size}, but there are {len(task.shards.sizes)} clients")
    if delivery.aggregator.needs_reference:
        raise ValueError("this aggregator compares with the server's own data, which a cross-device run has none of")


def _open_store(algorithm: FederatedAlgorithm, params, num_clients: int, directory: pathlib.Path,
                step: int) -> ClientStore | None:
    """What the clients keep, as it was after round `step`; None where they keep nothing."""
    if algorithm.init_client is None:
        return None
    if jax.process_count() > 1:
        raise ValueError("what clients keep between rounds lies on one host: this needs a single process")
    return ClientStore.open(directory / "clients", num_clients, functools.partial(algorithm.init_client, params),
                            step=step)
