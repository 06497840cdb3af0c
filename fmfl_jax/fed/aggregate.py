"""Over the clients of all devices: the weighted mean as a running sum, or all messages gathered. The only communication
of a round."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmfl_jax.fed.algorithm import AXIS, Cohort, Mean, Stack


class ClientOutput(NamedTuple):
    """What one client's pass gives. message: pytree. scalars: dict of float32. kept: pytree, returned per client.
    counts: bool, the message is there and finite (a lost one that the last stands in for counts). told: bool, the
    client itself was heard and finite: its scalars count."""

    message: Any
    scalars: dict
    kept: Any
    counts: jax.Array
    told: jax.Array


def default_clients_per_pass() -> int | None:
    """1 on a CPU, None (all) elsewhere.

    One client's step already fills a CPU's cores, and its activations stay in the cache: 20 at once take 1.3 times the
    time per token and 20 times the memory (BUILD_NOTES.md, speed). An accelerator wants the large products.
    """
    return 1 if jax.default_backend() == "cpu" else None


def over_clients(client_fn: Callable, cohort: Cohort, clients_per_pass: int | None, reduce: Callable):
    """Runs client_fn(one client's part of the cohort) -> ClientOutput for all clients of this device.

    The clients go through client_fn together (vmap: one pass over the frozen weights for all), `clients_per_pass` at a
    time where that is given. reduce(ClientOutput [P, ...], the pass's part of the cohort) -> pytree that is added up
    over the passes, so that memory holds one pass and one running sum. Returns (sum, rest [C, ...]), with `reduce`
    returning (summand, rest of the pass).

    Raises ValueError when clients_per_pass does not divide the device's clients.
    """
    num_clients = cohort.client_ids.shape[0]
    per_pass = num_clients if clients_per_pass is None else min(clients_per_pass, num_clients)
    if num_clients % per_pass:
        raise ValueError(f"clients_per_pass {per_pass} does not divide the {num_clients} clients of a device")
    cohort, root = cohort._replace(root=None), cohort.root

    def one_pass(group: Cohort):
        if per_pass == 1:  # no vmap: a loop over one client's own number of steps stays a loop
            output = client_fn(jax.tree.map(lambda x: x[0], group)._replace(root=root))
            output = jax.tree.map(lambda x: x[None], output)
        else:
            output = jax.vmap(lambda own: client_fn(own._replace(root=root)))(group)
        return reduce(output, group)

    if per_pass == num_clients:
        return one_pass(cohort)
    groups = jax.tree.map(lambda x: x.reshape(num_clients // per_pass, per_pass, *x.shape[1:]), cohort)
    shapes = jax.eval_shape(one_pass, jax.tree.map(lambda x: x[0], groups))[0]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total, group):
        summand, rest = one_pass(group)
        return jax.tree.map(jnp.add, total, summand), rest

    total, rest = jax.lax.scan(add, zeros, groups)
    return total, jax.tree.map(lambda x: x.reshape(num_clients, *x.shape[2:]), rest)


def weighted_mean_over_clients(client_fn: Callable, cohort: Cohort, clients_per_pass: int | None):
    """(Mean, counts, kept [C, ...]): the weighted mean over all clients of all devices.

    A client whose message does not count gets weight and normalizer 0: what is not finite never reaches the model. The
    update is 0 where all normalizers are. counts: {"dropped_clients": with a weight, heard but not finite,
    "counted_clients": told and with a weight, "attackers": those of them that are malicious, where that is known}.
    """

    def reduce(output: ClientOutput, group: Cohort):
        weights = jnp.where(output.counts, group.weights, 0.0)
        summand = (weighted_sum(output.message, weights), _sums(output, group, weights))
        return summand, output.kept

    (message, sums), kept = over_clients(client_fn, cohort, clients_per_pass, reduce)
    message, sums = jax.lax.psum((message, sums), AXIS)
    return _mean(divided(message, sums["normalizer"]), sums), sums["counts"], kept


def stack_over_clients(client_fn: Callable, cohort: Cohort, clients_per_pass: int | None):
    """(Stack without a reference, Mean without an update, counts, kept [C, ...]): every message, on every device."""

    def reduce(output: ClientOutput, group: Cohort):
        weights = jnp.where(output.counts, group.weights, 0.0)
        messages = jax.tree.map(lambda x: jnp.where(_as_mask(weights > 0, x), x, jnp.zeros_like(x)), output.message)
        return _sums(output, group, weights), (output.kept, messages, weights, _normalizers(output, group))

    sums, (kept, *mine) = over_clients(client_fn, cohort, clients_per_pass, reduce)
    sums = jax.lax.psum(sums, AXIS)
    gather = lambda x: jax.lax.all_gather(x, AXIS, tiled=True)
    messages, weights, normalizers, extras, ids = jax.tree.map(gather, (*mine, cohort.extras, cohort.client_ids))
    return Stack(messages, weights, normalizers, extras, client_ids=ids), _mean(None, sums), sums["counts"], kept


def weighted_sum(tree, weights):
    """sum_c weights_c x_c over leaves [C, ...] -> [...]; what has weight 0 may be anything (0 * nan is nan)."""

    def one(leaf):
        mask = _as_mask(weights, leaf)
        return jnp.sum(jnp.where(mask > 0, mask * leaf, jnp.zeros_like(leaf)), axis=0)

    return jax.tree.map(one, tree)


def divided(tree, total):
    """tree / total, or the tree where total is 0."""
    safe = jnp.where(total > 0, total, 1.0)
    return jax.tree.map(lambda x: x / safe, tree)


def stack_mean(stack: Stack):
    """The weighted mean of a stack's messages."""
    return divided(weighted_sum(stack.messages, stack.weights), jnp.sum(stack.normalizers))


def _sums(output: ClientOutput, group: Cohort, weights) -> dict:
    told = jnp.where(output.told, weights, 0.0)
    weighty = group.weights > 0
    counts = {"dropped_clients": group.heard & ~output.told & weighty, "counted_clients": output.told & weighty}
    if "malicious" in group.extras:
        counts["attackers"] = counts["counted_clients"] & group.extras["malicious"]
    return {
        "scalars": weighted_sum(output.scalars, told),
        "told": jnp.sum(told),
        "weight": jnp.sum(weights),
        "normalizer": jnp.sum(_normalizers(output, group)),
        "counts": {name: jnp.sum(them.astype(jnp.float32)) for name, them in counts.items()},
    }


def _normalizers(output: ClientOutput, group: Cohort):
    """A client that was heard but is not finite leaves the denominator too; one that was lost may stay in it."""
    return jnp.where(group.heard & ~output.counts, 0.0, group.normalizers)


def _mean(update, sums: dict) -> Mean:
    return Mean(update, divided(sums["scalars"], sums["told"]), sums["weight"], sums["normalizer"])


def _as_mask(per_client, leaf):
    """[C] -> [C, 1, ...] to stand beside a leaf [C, ...]."""
    return per_client.reshape(-1, *(1,) * (leaf.ndim - 1))
