"""Small models by the thousand: cohorts of unequal clients, rounds, evaluation, checkpoints, and a report.

The rows of all clients lie on the device once; a round sends row numbers. Memory is the rows plus one cohort, whatever
the number of clients.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import matplotlib

matplotlib.use("Agg")  # files only
import matplotlib.pyplot as plt
import numpy as np
import optax

from fmfl_jax.experiment.checkpointing import open_checkpoints, restore_state, save_state
from fmfl_jax.experiment.client_store import ClientStore
from fmfl_jax.experiment.config import ServerConfig, make_uplink
from fmfl_jax.experiment.federation import extras_of, make_aggregator, make_selector, make_weigh, message_attack
from fmfl_jax.experiment.federation_config import FederationConfig
from fmfl_jax.experiment.federation_privacy import noise_multiplier, spent_on
from fmfl_jax.experiment.records import read_history, write_history, write_json
from fmfl_jax.experiment.rounds import RoundsConfig, open_store
from fmfl_jax.fed import attacks
from fmfl_jax.fed.algorithm import Cohort, Delivery, ServerState
from fmfl_jax.fed.execution import MODES, Execution, default_mode, execute_fed_opt
from fmfl_jax.fed.scaffold import scaffold
from fmfl_jax.fed.sharding import pmap_round, replicate, shard_cohort, spread
from fmfl_jax.progress import Progress
from fmfl_jax.small.batches import Shards, epoch_batches, max_steps
from fmfl_jax.small.data import Task, image_task, linear_task, read_labelled_text, text_task
from fmfl_jax.small.models import (
    Model,
    classification_grad,
    linear_classifier,
    make_evaluator,
    small_cnn,
    text_classifier,
)

ALGORITHMS = ("fedavg", "fedprox", "scaffold")  # with any of ServerConfig's optimizers
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
            return linear_classifier(64, 10), linear_task(
                self.num_clients, num_features=64, num_test=5000, seed=self.seed
            )
        if self.name == "images":
            task = image_task(
                self.num_clients,
                num_rows=max(10_000, 10 * self.num_clients),
                alpha=self.alpha,
                num_test=2000,
                seed=self.seed,
            )
            return small_cnn(28, 10), task
        num_buckets = 2**14
        task = text_task(
            read_labelled_text(self.train_text),
            read_labelled_text(self.test_text),
            self.num_clients,
            alpha=self.alpha,
            num_buckets=num_buckets,
            max_ngrams=128,
            seed=self.seed,
        )
        return text_classifier(num_buckets, 4), task


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossDeviceConfig:
    """A run. In each round cohort_size clients (on average, where the selection is Poisson's) take local_epochs of SGD
    over their own rows.

    federation: of ALGORITHMS, with any attack, any aggregator that needs no data of the server's, and privacy "dp".
    uplink: see `make_uplink`. execution: "auto" (fed/execution.py, `default_mode`) or a mode. eval_every,
    checkpoint_every: in rounds; the last round is always evaluated and kept.
    """

    num_rounds: int = 100
    cohort_size: int = 50
    batch_size: int = 10
    local_epochs: int = 1
    client_lr: float = 0.1
    federation: FederationConfig = FederationConfig()
    server: ServerConfig = ServerConfig()
    uplink: str | None = None
    execution: str = "auto"
    seed: int = 0
    eval_every: int = 10
    checkpoint_every: int = 50

    def __post_init__(self):
        for name in ("num_rounds", "cohort_size", "batch_size", "local_epochs", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.execution not in ("auto", *MODES):
            raise ValueError(f"execution is {self.execution!r}: expected one of auto, {', '.join(MODES)}")
        if self.client_lr <= 0:
            raise ValueError(f"client_lr must be above 0, got {self.client_lr}")
        make_uplink(self.uplink)
        for reason in _refusals(self):
            raise ValueError(reason)

    @property
    def rounds(self) -> RoundsConfig:
        """What the parts of a federation want to know of the run."""
        return RoundsConfig(
            num_rounds=self.num_rounds,
            cohort_size=self.cohort_size,
            local_steps=1,
            batch_size=self.batch_size,
            seed=self.seed,
        )

    @property
    def name(self) -> str:
        """The algorithm; of FedAvg the name that its server's optimizer gives it."""
        if self.federation.algorithm != "fedavg":
            return self.federation.algorithm
        if self.server.optimizer != "sgd":
            return self.server.optimizer
        return "fedavgm" if self.server.momentum else "fedavg"


def _refusals(c: CrossDeviceConfig):
    """What a cross-device run does not serve."""
    fed = c.federation
    if fed.algorithm not in ALGORITHMS:
        yield f"--algorithm={fed.algorithm} is for launch.federated: small models take {', '.join(ALGORITHMS)}"
    if fed.personalization != "none":
        yield f"--personalization={fed.personalization} is for launch.federated: here all clients share one model"
    if set(fed.privacy) - {"dp"}:
        yield f"--privacy={','.join(fed.privacy)} is for launch.federated: small models take dp"
    if fed.client_optimizer == "adamw":
        yield "--client_optimizer=adamw is for launch.federated: small models take SGD steps"
    if fed.selection not in ("uniform", "poisson"):
        yield f"--selection={fed.selection} is for launch.federated: small models take uniform or poisson"
    if fed.aggregator == "fltrust":
        yield "--aggregator=fltrust compares with the server's own data, which a cross-device run has none of"
    if fed.algorithm == "scaffold" and c.execution == "steps":
        yield "--algorithm=scaffold by steps: its clients do more than steps of one optimizer, use scan or vmap"


class CrossDeviceResult(NamedTuple):
    """state: after the last round. history: one dict per round. execution: the mode that ran."""

    state: ServerState
    history: list[dict[str, Any]]
    execution: str


def run_cross_device(
    config: CrossDeviceConfig,
    model: Model,
    task: Task,
    directory: str | pathlib.Path,
    *,
    label: str = "rounds",
    on_evaluation: Callable[[dict], None] | None = None,
) -> CrossDeviceResult:
    """Runs config.num_rounds rounds of any (init, apply) model, or what is left of them after the checkpoint in
    `directory`.

    Everything random follows from (seed, round, client), so a run that was stopped and continued ends with the same
    bits. history is kept in directory/metrics.jsonl; round 0 is the model before training. `round_s` is the time
    from one evaluation or checkpoint to the next, divided by the rounds, which are not waited for one by one; the first
    round, which compiles, has none.

    Raises ValueError where cohort_size exceeds the clients.
    """
    sizes = task.shards.sizes
    if config.cohort_size > len(sizes):
        raise ValueError(f"cohort_size is {config.cohort_size}, but there are {len(sizes)} clients")
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    params, noise = model.init(jax.random.key(config.seed)), noise_multiplier(config.federation, config.rounds, sizes)
    mode, execution, weigh = execution_of(config, model, task, params, noise)
    frozen = replicate(rows_of(config, task), copy=False)
    num_steps = max_steps(task.shards, batch_size=config.batch_size, epochs=config.local_epochs)
    selector = make_selector(config.federation, config.rounds, sizes)
    capacity = selector.capacity(len(sizes), num_rounds=config.num_rounds, seed=config.seed)
    extras = extras_of(config.federation, config.rounds, len(sizes))
    spent = spent_on(config.federation, config.rounds, sizes, noise)
    state = replicate(execution.algorithm.init(params, config.seed))
    evaluate = make_evaluator(model, *task.test)

    def evaluated(record: dict):
        record |= evaluate(jax.tree.map(lambda x: x.addressable_data(0), state.params))
        if spent is not None:
            record |= spent([()] * record["round"])  # of the cohorts only their number counts
        if on_evaluation is not None:
            on_evaluation(record)

    with open_checkpoints(directory / "checkpoints") as checkpoints:
        if (restored := restore_state(checkpoints, state)) is not None:
            start, state = restored
            history = read_history(directory, up_to_round=start)
        else:
            start, history = 0, [{"round": 0}]
            evaluated(history[0])
        store = open_store(execution.algorithm, params, len(sizes), directory, start)
        pending, since = [], None  # rounds under way; when the first of them began, None where it compiles
        progress = Progress(config.num_rounds, label=label, unit="round", done=start)
        for r in progress.track(range(start, config.num_rounds)):
            ids = selector.select(selector.init(len(sizes)), round=r, seed=config.seed)
            laid_out = cohort_of(
                ids,
                task.shards,
                r,
                num_steps=num_steps,
                seed=config.seed,
                batch_size=config.batch_size,
                epochs=config.local_epochs,
                capacity=capacity,
                clients_per_pass=execution.clients_per_pass,
                weigh=weigh,
                store=store,
                extras=extras,
            )
            state, metrics, report = execution.round(state, frozen, spread(laid_out))
            if store is not None:
                store.scatter(
                    ids, jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:])[: len(ids)], report.states)
                )
            pending.append({"round": r + 1} | metrics)
            last = r + 1 == config.num_rounds
            keep, look = last or (r + 1) % config.checkpoint_every == 0, last or (r + 1) % config.eval_every == 0
            if not (keep or look or r == start):
                continue
            records = jax.device_get(pending)  # waits for the rounds
            round_s = None if since is None else (time.perf_counter() - since) / len(pending)
            history += [
                {k: float(v) for k, v in record.items()} | {"round": record["round"], "round_s": round_s}
                for record in records
            ]
            if look:
                evaluated(history[-1])
            if keep:
                write_history(directory, history)
                save_state(checkpoints, r + 1, state)
                if store is not None:
                    store.commit(r + 1)
            pending, since = [], time.perf_counter()
    return CrossDeviceResult(state, history, mode)


def execution_of(
    config: CrossDeviceConfig, model: Model, task: Task, params, noise: float | None
) -> tuple[str, Execution, Callable | None]:
    """(mode, Execution, weigh): how a device's clients run, and a client's weight by its rows."""
    fed, grad_fn = config.federation, classification_grad(model)
    aggregator = make_aggregator(fed, config.rounds, task.shards.sizes, noise, None, params)
    delivery = Delivery(uplink=make_uplink(config.uplink), aggregator=aggregator, attack=message_attack(fed.attack))
    weigh = make_weigh(fed, aggregator)
    mode = config.execution
    if mode == "auto":
        shapes = {name: getattr(task.train, name) for name in ("x", "y")}
        mode = mode_for(grad_fn, params, shapes, config.batch_size)
        mode = "scan" if fed.algorithm == "scaffold" and mode == "steps" else mode
    if fed.algorithm == "scaffold":
        delivery = dataclasses.replace(delivery, clients_per_pass=1 if mode == "scan" else None)
        algorithm = scaffold(
            grad_fn, config.client_lr, config.server.make(), num_clients=len(task.shards.sizes), delivery=delivery
        )
        return mode, Execution(algorithm, pmap_round(algorithm), delivery.clients_per_pass), weigh
    return (
        mode,
        execute_fed_opt(
            mode, grad_fn, optax.sgd(config.client_lr), config.server.make(), proximal=fed.proximal, delivery=delivery
        ),
        weigh,
    )


def rows_of(config: CrossDeviceConfig, task: Task) -> dict:
    """{"x", "y"} of all clients; those of clients that flip labels are flipped."""
    y, fed = task.train.y, config.federation
    if fed.attack == "label_flip":
        malicious = extras_of(fed, config.rounds, len(task.shards.sizes))["malicious"]
        flips = np.zeros(len(y), bool)
        flips[task.shards.rows] = np.repeat(malicious, task.shards.sizes)
        y = attacks.flip_labels(y, flips, int(y.max()) + 1)
    return {"x": task.train.x, "y": y}


def mode_for(grad_fn: Callable, params, frozen, batch_size: int) -> str:
    """`default_mode` of a gradient over row numbers."""
    batch = {"index": jax.ShapeDtypeStruct((batch_size,), np.int32), "mask": jax.ShapeDtypeStruct((batch_size,), bool)}
    return default_mode(grad_fn, params, frozen, batch)


def cohort_of(
    ids: np.ndarray,
    shards: Shards,
    r: int,
    *,
    num_steps: int,
    seed: int,
    batch_size: int,
    epochs: int,
    clients_per_pass: int | None,
    capacity: int | None = None,
    weigh: Callable | None = None,
    store: ClientStore | None = None,
    extras: dict | None = None,
) -> Cohort:
    """The cohort of these clients in round r, numpy leaves [devices, C, ...], filled up to `capacity` with clients of
    weight 0 that take no step."""
    there = np.arange(len(ids) if capacity is None else capacity) < len(ids)
    ids = np.concatenate([ids, np.zeros(len(there) - len(ids), ids.dtype)])
    batches, steps = epoch_batches(
        shards, ids, round=r, seed=seed, batch_size=batch_size, epochs=epochs, num_steps=num_steps
    )
    sizes = shards.sizes[ids].astype(np.float32)
    weights = sizes if weigh is None else np.asarray(weigh(sizes), np.float32)
    of_clients = {name: np.asarray(x)[ids] for name, x in (extras or {}).items()}
    cohort = Cohort(
        ids.astype(np.int32),
        np.where(there, weights, np.float32(0)),
        batches,
        client_states=() if store is None else store.gather(ids),
        extras=of_clients | {"num_steps": np.where(there, steps, 0).astype(np.int32)},
    )
    return shard_cohort(cohort, num_devices=jax.device_count(), clients_per_pass=clients_per_pass)


def run_centralized(
    config: CrossDeviceConfig,
    model: Model,
    task: Task,
    directory: str | pathlib.Path,
    *,
    epochs: int,
    learning_rate: float,
    on_evaluation: Callable[[dict], None] | None = None,
) -> CrossDeviceResult:
    """The same model and SGD in the same batches with all rows in one place: one client, an epoch a round."""
    pooled = task._replace(shards=Shards(task.shards.rows, np.asarray([0, len(task.shards.rows)])))
    config = dataclasses.replace(
        config,
        num_rounds=epochs,
        cohort_size=1,
        local_epochs=1,
        client_lr=learning_rate,
        federation=FederationConfig(),
        server=ServerConfig(),
        uplink=None,
        eval_every=1,
        checkpoint_every=epochs,
    )
    return run_cross_device(config, model, pooled, directory, label="centralized", on_evaluation=on_evaluation)


def write_report(
    directory: str | pathlib.Path,
    config: CrossDeviceConfig,
    task: Task,
    result: CrossDeviceResult,
    centralized: CrossDeviceResult | None,
) -> dict:
    """Writes accuracy.png and row.json and returns the row. round_s: median over the rounds."""
    directory, looks = pathlib.Path(directory), [record for record in result.history if "accuracy" in record]
    sizes = task.shards.sizes
    times = [record["round_s"] for record in result.history[1:] if record["round_s"] is not None]
    row = {
        "algorithm": config.name,
        "execution": result.execution,
        "clients": len(sizes),
        "rows_per_client": {"min": int(sizes.min()), "median": float(np.median(sizes)), "max": int(sizes.max())},
        "rounds": config.num_rounds,
        "params": sum(x.size for x in jax.tree.leaves(result.state.params)),
        "accuracy_before": looks[0]["accuracy"],
        "accuracy": looks[-1]["accuracy"],
        "nll": looks[-1]["nll"],
        "best_accuracy": max(record["accuracy"] for record in looks),
        "centralized_accuracy": None if centralized is None else centralized.history[-1]["accuracy"],
        "best_centralized_accuracy": None if centralized is None else max(r["accuracy"] for r in centralized.history),
        "round_s": float(np.median(times)) if times else None,
    }
    row |= {name: looks[-1][name] for name in ("epsilon", "epsilon_rdp", "delta") if name in looks[-1]}
    write_json(directory / "row.json", row)
    if jax.process_index() == 0:
        _plot(directory / "accuracy.png", config.name, looks, row["centralized_accuracy"])
    return row


def _plot(path: pathlib.Path, name: str, looks: list[dict], centralized: float | None) -> None:
    """Test accuracy by round, the centralized one as a dashed line."""
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    ax.plot(
        [record["round"] for record in looks],
        [record["accuracy"] for record in looks],
        marker="." if len(looks) < 30 else None,
        label=name,
    )
    if centralized is not None:
        ax.axhline(centralized, color="black", linestyle="--", label="all data in one place")
    ax.set(xlabel="round", ylabel="accuracy on the test rows", ylim=(0, 1))
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(path, dpi=120)
    plt.close(fig)
