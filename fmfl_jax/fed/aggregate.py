"""Sums over the clients of all devices: the only communication of a round."""

from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from fmfl_jax.fed.algorithm import AXIS, Cohort


class CohortMean(NamedTuple):
    """values: sum of weight x value / sum of normalizers. scalars: weighted means. weight, normalizer: the two sums.
    dropped: clients with a weight whose values were not finite. kept: pytree [C, ...] of this device's clients."""

    values: Any
    scalars: dict
    weight: jax.Array
    normalizer: jax.Array
    dropped: jax.Array
    kept: Any


def default_clients_per_pass() -> int | None:
    """1 on a CPU, None (all) elsewhere.

    One client's step already fills a CPU's cores, and its activations stay in the cache: 20 at once take 1.3 times the
    time per token and 20 times the memory (BUILD_NOTES.md, speed). An accelerator wants the large products.
    """
    return 1 if jax.default_backend() == "cpu" else None


def weighted_mean_over_clients(client_fn: Callable, cohort: Cohort, *,
                               clients_per_pass: int | None = None) -> CohortMean:
    """Weighted mean over all clients of all devices of client_fn(one client's part of the cohort).

    client_fn returns (values, scalars, kept): a pytree of arrays (the delta), a dict of float32 scalars, and a pytree
    that stays with the client. The clients of a device go through client_fn together (vmap: one pass over the frozen
    weights for all), `clients_per_pass` at a time where that is given, so that memory holds the activations of one pass
    and one running sum. A client whose values are not all finite gets weight and normalizer 0: it never reaches the
    model. Values and scalars are 0 where all weights are.

    Raises ValueError when clients_per_pass does not divide the device's clients.
    """
    num_clients = cohort.client_ids.shape[0]
    per_pass = num_clients if clients_per_pass is None else min(clients_per_pass, num_clients)
    if num_clients % per_pass:
        raise ValueError(f"clients_per_pass {per_pass} does not divide the {num_clients} clients of a device")

    def one_pass(group: Cohort):
        values, scalars, kept = jax.vmap(client_fn)(group)
        finite = jnp.ones(per_pass, bool)
        for leaf in jax.tree.leaves((values, scalars)):
            finite &= jnp.all(jnp.isfinite(leaf.reshape(per_pass, -1)), axis=1)
        weights = jnp.where(finite, group.weights, 0.0)
        normalizers = weights if group.normalizers is None else jnp.where(finite, group.normalizers, 0.0)
        dropped = jnp.sum((~finite & (group.weights > 0)).astype(jnp.float32))

        def weighted_sum(leaf):  # [C, ...] -> [...]; where, since 0 * nan is nan
            mask = weights.reshape(-1, *(1,) * (leaf.ndim - 1))
            return jnp.sum(jnp.where(mask > 0, mask * leaf, jnp.zeros_like(leaf)), axis=0)

        sums = jax.tree.map(weighted_sum, (values, scalars)), jnp.sum(weights), jnp.sum(normalizers), dropped
        return sums, kept

    if per_pass == num_clients:
        sums, kept = one_pass(cohort)
    else:
        groups = jax.tree.map(lambda x: x.reshape(num_clients // per_pass, per_pass, *x.shape[1:]), cohort)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                             jax.eval_shape(one_pass, jax.tree.map(lambda x: x[0], groups))[0])

        def add(total, group):
            sums, kept = one_pass(group)
            return jax.tree.map(jnp.add, total, sums), kept

        sums, kept = jax.lax.scan(add, zeros, groups)
        kept = jax.tree.map(lambda x: x.reshape(num_clients, *x.shape[2:]), kept)
    (values, scalars), weight, normalizer, dropped = jax.lax.psum(sums, AXIS)

    def divided(tree, total):
        safe = jnp.where(total > 0, total, 1.0)
        return jax.tree.map(lambda x: x / safe, tree)

    return CohortMean(divided(values, normalizer), divided(scalars, weight), weight, normalizer, dropped, kept)
