"""Sums over the clients of all devices: the only communication of a round."""

from typing import Callable

import jax
import jax.numpy as jnp

from fmfl_jax.fed.algorithm import AXIS, Cohort


def weighted_mean_over_clients(client_fn: Callable, cohort: Cohort, *, clients_per_pass: int | None = None):
    """Weighted mean of client_fn(client_id, batches) -> (values, scalars) over all clients of all devices.

    values: pytree of arrays (the delta); scalars: dict of float32 scalars. The clients of a device go through
    client_fn together (vmap: one pass over the frozen weights for all), `clients_per_pass` at a time where that is
    given, so that memory holds the activations of one pass and one running sum. A client whose values are not all
    finite gets weight 0: it never reaches the model.

    Returns (values, scalars, total weight, number of clients dropped as not finite). With total weight 0 the values
    are 0. Raises ValueError when clients_per_pass does not divide the device's clients.
    """
    num_clients = cohort.client_ids.shape[0]
    per_pass = num_clients if clients_per_pass is None else min(clients_per_pass, num_clients)
    if num_clients % per_pass:
        raise ValueError(f"clients_per_pass {per_pass} does not divide the {num_clients} clients of a device")

    def one_pass(group: Cohort):
        values, scalars = jax.vmap(client_fn)(group.client_ids, group.batches)
        finite = jnp.ones(per_pass, bool)
        for leaf in jax.tree.leaves((values, scalars)):
            finite &= jnp.all(jnp.isfinite(leaf.reshape(per_pass, -1)), axis=1)
        weights = jnp.where(finite, group.weights, 0.0)
        dropped = jnp.sum((~finite & (group.weights > 0)).astype(jnp.float32))

        def weighted_sum(leaf):  # [C, ...] -> [...]; where, since 0 * nan is nan
            mask = weights.reshape(-1, *(1,) * (leaf.ndim - 1))
            return jnp.sum(jnp.where(mask > 0, mask * leaf, jnp.zeros_like(leaf)), axis=0)

        return jax.tree.map(weighted_sum, (values, scalars)), jnp.sum(weights), dropped

    if per_pass == num_clients:
        sums = one_pass(cohort)
    else:
        groups = jax.tree.map(lambda x: x.reshape(num_clients // per_pass, per_pass, *x.shape[1:]), cohort)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                             jax.eval_shape(one_pass, jax.tree.map(lambda x: x[0], groups)))
        sums, _ = jax.lax.scan(lambda total, group: (jax.tree.map(jnp.add, total, one_pass(group)), None),
                               zeros, groups)
    (values, scalars), total, dropped = jax.lax.psum(sums, AXIS)
    safe = jnp.where(total > 0, total, 1.0)
    return *jax.tree.map(lambda x: x / safe, (values, scalars)), total, dropped
