"""Rounds over devices: pad the cohort, lay it out, and run the SPMD round under pmap."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fmfl_jax.fed.core.types import AXIS, Cohort, FederatedAlgorithm


def padded_cohort_size(cohort_size: int, *, num_devices: int, clients_per_pass: int | None = None) -> int:
    """The smallest number of clients >= cohort_size that fills every device with whole passes."""
    per_device = -(-cohort_size // num_devices)
    if clients_per_pass is not None and clients_per_pass < per_device:
        per_device = -(-per_device // clients_per_pass) * clients_per_pass
    return per_device * num_devices


def shard_cohort(cohort: Cohort, *, num_devices: int, clients_per_pass: int | None = None) -> Cohort:
    """Host arrays [C, ...] -> [num_devices, C', ...], padded with clients of weight 0 that repeat the first client.

    Normalizers and who is heard are always there, so that one and the same program serves plain FedAvg and
    inverse-probability weights: two programs may round differently. An empty cohort cannot be padded: ValueError.
    """
    cohort = jax.tree.map(np.asarray, cohort)
    size = len(cohort.client_ids)
    if not size:
        raise ValueError("an empty cohort has no client to pad with: give it one of weight 0")
    padding = padded_cohort_size(size, num_devices=num_devices, clients_per_pass=clients_per_pass) - size

    def pad(x):
        x = np.concatenate([x, np.repeat(x[:1], padding, axis=0)]) if padding else x
        return x.reshape(num_devices, len(x) // num_devices, *x.shape[1:])  # not -1: x may hold no values

    def pad_zeros(x):
        return np.concatenate([x, np.zeros(padding, x.dtype)]).reshape(num_devices, -1)

    def per_client(x, default):
        return pad_zeros(default if x is None else x)

    heard = per_client(cohort.heard, cohort.weights > 0)
    weights = pad_zeros(cohort.weights)
    return Cohort(
        pad(cohort.client_ids),
        weights,
        jax.tree.map(pad, cohort.batches),
        np.where(heard, weights, np.float32(0)) if cohort.normalizers is None else pad_zeros(cohort.normalizers),
        jax.tree.map(pad, cohort.client_states),
        heard,
        jax.tree.map(pad, cohort.extras),
        jax.tree.map(lambda x: np.broadcast_to(x, (num_devices, *x.shape)), cohort.root),
    )


def process_devices() -> slice:
    """Which of all devices, in a layout [devices, ...], are this process's own."""
    start = jax.process_index() * jax.local_device_count()
    return slice(start, start + jax.local_device_count())


def spread(tree):
    """Host arrays laid out as [devices, ...], the same in every process, as the arguments of a compiled round: with one
    process they are taken as they are, with several each process puts its devices' part of one global array."""
    if jax.process_count() == 1:
        return tree
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()), (AXIS,)), PartitionSpec(AXIS))
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)


def replicate(tree, *, copy=True):
    """Puts a tree on every device once, so that rounds do not copy it.

    copy: a device that holds an array already gets its own copy all the same, which may be donated. False spares the
    memory, for what is never donated.
    """
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()), (AXIS,)), PartitionSpec())

    def put(x):
        if jax.process_count() > 1:  # each process puts the same values on its own devices
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
        return jax.device_put(jnp.array(x) if copy else x, sharding)

    return jax.tree.map(put, tree)


def pmap_round(algorithm: FederatedAlgorithm) -> Callable:
    """round(state, frozen, cohort [devices, C, ...]) -> (state, metrics, ClientReport [devices, C, ...]), one SPMD
    program over all devices.

    state and frozen are replicated (see `replicate`); the old state's memory is given to the new one.
    """
    return jax.pmap(
        algorithm.round, axis_name=AXIS, in_axes=(None, None, 0), out_axes=(None, None, 0), donate_argnums=0
    )
