"""Cohorts on devices: the one place where they are padded and laid out, and the one where the padding comes off."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from fmfl_jax.fed.core.types import Cohort, Tree
from fmfl_jax.parallel import AXIS, spread


def padded_size(cohort_size: int, *, num_devices: int, clients_per_pass: int | None = None) -> int:
    """The smallest number of clients >= cohort_size that fills every device with whole passes."""
    per_device = -(-cohort_size // num_devices)
    if clients_per_pass is not None and clients_per_pass < per_device:
        per_device = -(-per_device // clients_per_pass) * clients_per_pass
    return per_device * num_devices


def lay_out(
    cohort: Cohort, *, num_devices: int, clients_per_pass: int | None = None, capacity: int | None = None
) -> Cohort:
    """Host arrays [K, ...] -> [devices, C, ...], filled up with clients whose every number is 0.

    A client of weight 0 that is not delivered counts for nothing. capacity: the largest cohort of the run, so that all
    rounds have one shape and compile once; None: K. Denominators and who is delivered are always there, so that one and
    the same program serves plain FedAvg and inverse-probability weights: two programs may round differently.
    Raises ValueError for more clients than the capacity, and where both are 0.
    """
    cohort = jax.tree.map(np.asarray, cohort)
    count = len(cohort.client_ids)
    capacity = count if capacity is None else capacity
    if not 1 <= capacity >= count:
        raise ValueError(f"a cohort of {count} clients does not fit a capacity of {capacity}")
    size = padded_size(capacity, num_devices=num_devices, clients_per_pass=clients_per_pass)

    def pad(x):
        x = np.concatenate([x, np.zeros((size - count, *x.shape[1:]), x.dtype)]) if size > count else x
        return x.reshape(num_devices, size // num_devices, *x.shape[1:])

    delivered = cohort.weights > 0 if cohort.delivered is None else cohort.delivered
    if cohort.denominators is None:
        cohort = cohort._replace(denominators=np.where(delivered, cohort.weights, np.float32(0)))
    server_batches = jax.tree.map(lambda x: np.broadcast_to(x, (num_devices, *x.shape)), cohort.server_batches)
    padded = jax.tree.map(pad, cohort._replace(delivered=delivered, server_batches=None))
    return padded._replace(server_batches=server_batches)


def put_on_devices(
    cohort: Cohort,
    *,
    clients_per_pass: int | None = None,
    capacity: int | None = None,
    mesh: Mesh | None = None,
) -> Cohort:
    """`lay_out` over all devices of all processes, or over the clients' axis of the mesh of one process, as the
    argument of a compiled round."""
    num_devices = jax.device_count() if mesh is None else mesh.shape[AXIS]
    return spread(lay_out(cohort, num_devices=num_devices, clients_per_pass=clients_per_pass, capacity=capacity))


def without_padding(tree: Tree, count: int) -> Tree:
    """[devices, C, ...] of a round's output -> host arrays [count, ...], in the cohort's order."""
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:])[:count], tree)
