"""A small classifier and its clients' rows as a federation sees them: task, batches, held-out rows, network job.

The rows of all clients lie on the device once; a round sends row numbers. Memory is the rows plus one cohort, whatever
the number of clients.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax import streams
from fmfl_jax.data.classification import Task, image_task, linear_task, read_labelled_text, text_task
from fmfl_jax.data.shards import Shards, epoch_batches, max_steps, shards_of
from fmfl_jax.experiment.build.federation import Learner, client_extras
from fmfl_jax.experiment.config.cross_device import CrossDeviceConfig, TaskConfig
from fmfl_jax.experiment.config.network import NetworkConfig
from fmfl_jax.experiment.loop.participation import Record
from fmfl_jax.experiment.loop.rounds import Callback, RoundView, Source
from fmfl_jax.experiment.methods.attacks import LabelFlip
from fmfl_jax.experiment.network.rounds import NetworkJob
from fmfl_jax.experiment.network.workload import deal_devices
from fmfl_jax.fed import attacks
from fmfl_jax.fed.core.types import FederatedAlgorithm, Params
from fmfl_jax.models.classifiers import (
    Model,
    classification_loss,
    classification_sums,
    linear_classifier,
    small_cnn,
    text_classifier,
)
from fmfl_jax.parallel import local_copy
from fmfl_jax.wireless import compute


def make_task(config: TaskConfig) -> tuple[Model, Task]:
    """The model and the data."""
    if config.name == "linear":
        return linear_classifier(64, 10), linear_task(
            config.num_clients, num_features=64, num_test=5000, seed=config.seed
        )
    if config.name == "images":
        task = image_task(
            config.num_clients,
            num_rows=max(10_000, 10 * config.num_clients),
            alpha=config.alpha,
            num_test=2000,
            seed=config.seed,
        )
        return small_cnn(28, 10), task
    assert config.train_text is not None and config.test_text is not None  # TaskConfig refuses agnews without them
    num_buckets = 2**14
    task = text_task(
        read_labelled_text(config.train_text),
        read_labelled_text(config.test_text),
        config.num_clients,
        alpha=config.alpha,
        num_buckets=num_buckets,
        max_ngrams=128,
        seed=config.seed,
    )
    return text_classifier(num_buckets, 4), task


def make_learner(model: Model, params: Params, learning_rate: float) -> Learner:
    """The mean cross-entropy of a batch of row numbers, by plain SGD."""
    return Learner(classification_loss(model), params, learning_rate, layers=model.layers, client_optimizer="sgd")


def make_source(config: CrossDeviceConfig, shards: Shards) -> Source:
    """The clients' epochs over their rows: unequal numbers of steps."""
    num_steps = max_steps(shards, batch_size=config.batch_size, epochs=config.local_epochs)

    def batches(client_ids, r):
        return epoch_batches(
            shards,
            client_ids,
            round=r,
            seed=config.seed,
            batch_size=config.batch_size,
            epochs=config.local_epochs,
            num_steps=num_steps,
        )

    sizes = shards.sizes
    extras = client_extras(config.federation, config.rounds(1), len(sizes))
    return Source(sizes=sizes, batches=batches, extras=extras)


def rows_of(config: CrossDeviceConfig, task: Task) -> dict[str, np.ndarray]:
    """{"x", "y"} of all clients; those of clients that flip labels are flipped."""
    y, fed = task.train.y, config.federation
    if isinstance(fed.attack, LabelFlip):
        malicious = client_extras(fed, config.rounds(1), len(task.shards.sizes))["malicious"]
        flips = np.zeros(len(y), bool)
        flips[task.shards.rows] = np.repeat(malicious, task.shards.sizes)
        y = attacks.flip_labels(y, flips, int(y.max()) + 1)
    return {"x": task.train.x, "y": y}


def hold_out_rows(shards: Shards, share: float, *, most: int, seed: int) -> tuple[Shards, Shards]:
    """(training rows, held-out rows): of every client a share, at least 1 and at most `most`, at random.

    Raises ValueError where a client has a single row: it cannot train and be evaluated.
    """
    train, held = [], []
    for client, rows in enumerate(np.split(shards.rows, shards.starts[1:-1])):
        if len(rows) < 2:
            raise ValueError(
                f"client {client} has a single row: a personal model needs one to train on and one held out"
            )
        count = min(most, max(1, round(share * len(rows))), len(rows) - 1)
        order = streams.host_rng(streams.HOLD_OUT, seed, client).permutation(rows)
        held.append(order[:count])
        train.append(order[count:])
    return shards_of(train), shards_of(held)


def make_client_evaluator(model: Model, algorithm: FederatedAlgorithm, held: Shards, *, group: int = 64) -> Callback:
    """The callback that evaluates each client's personal model, and the shared one, on the client's held-out rows:
    "client_accuracy_mean", "client_accuracy_worst_decile", "client_nll_std", "client_shared_accuracy_mean"."""
    if (personal := algorithm.personal) is None:
        raise ValueError("this algorithm's clients have no personal models")
    num_clients, most = len(held.sizes), int(held.sizes.max())
    index, mask = np.zeros((num_clients, most), np.int32), np.zeros((num_clients, most), bool)
    for client, rows in enumerate(np.split(held.rows, held.starts[1:-1])):
        index[client, : len(rows)], mask[client, : len(rows)] = rows, True

    @jax.jit
    def means_of(params, rows, states, index, mask):
        def one(state, index, mask):
            x, y = rows["x"][index], rows["y"][index]
            both = personal(params, state.algorithm), algorithm.shared(params)
            sums = jnp.stack([classification_sums(model, tuned, x, y, mask) for tuned in both])  # [2, hits and nll]
            return sums / jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1.0)

        return jax.vmap(one)(states, index, mask)  # [group, 2, 2]

    def evaluate(view: RoundView) -> Record:
        params, rows, means = local_copy(view.state.params), local_copy(view.frozen), []
        for start in range(0, num_clients, group):
            ids = np.minimum(np.arange(start, start + group), num_clients - 1)  # always the same shape
            both = means_of(params, rows, view.client_states(ids), index[ids], mask[ids])
            means.append(np.asarray(both)[: num_clients - start])
        (hits, nll), (shared, _) = np.moveaxis(np.concatenate(means), 0, -1)  # [C]
        worst = np.sort(hits)[: max(1, round(len(hits) / 10))]
        return {
            "client_accuracy_mean": float(hits.mean()),
            "client_accuracy_worst_decile": float(worst.mean()),
            "client_nll_std": float(nll.std()),
            "client_shared_accuracy_mean": float(shared.mean()),
        }

    return evaluate


def make_job(config: CrossDeviceConfig, network: NetworkConfig, model: Model, params: Params, task: Task) -> NetworkJob:
    """The network and what training this model asks of the clients' devices: steps by client.

    What a row costs beyond two FLOPs a parameter (convolutions use theirs at every pixel) is XLA's own count.
    """
    size = sum(math.prod(x.shape) for x in params.values())
    row = jax.ShapeDtypeStruct((1, *task.train.x.shape[1:]), task.train.x.dtype)
    cost = jax.jit(model.apply).lower(params, row).compile().cost_analysis() or {}
    work = compute.Workload(
        base_params=size,
        trainable_params=0,
        weight_bytes=4 * size,
        attention_flops=max(0.0, float(cost.get("flops", 0.0)) - 2.0 * size),
        activation_bytes=float(cost.get("bytes accessed", 0.0)) * config.batch_size,
    )
    sizes = task.shards.sizes
    devices = compute.stack_devices(deal_devices(network.devices, len(sizes)))
    steps = (config.local_epochs * -(-sizes // config.batch_size)).astype(np.float32)
    seconds = compute.training_time_s(devices, work, float(config.batch_size), steps)
    return NetworkJob(
        network=network.make_network(len(sizes)),
        compute_s=np.asarray(seconds),
        compute_j=np.asarray(compute.active_energy_j(devices, seconds)),
        able=np.asarray(compute.fits(devices, compute.training_memory_bytes(work))),
        aggregation=network.aggregation,
        rings=network.network == "facts_20",
    )


def local_steps(config: CrossDeviceConfig, shards: Shards) -> int:
    """Of the largest client."""
    return max_steps(shards, batch_size=config.batch_size, epochs=config.local_epochs)


def pooled(task: Task) -> Task:
    """All rows in one place."""
    return task._replace(shards=Shards(task.shards.rows, np.asarray([0, len(task.shards.rows)])))
