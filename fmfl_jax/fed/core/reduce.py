"""Over the clients of all devices: the weighted mean as a running sum, or all updates gathered. The only communication
of a round."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmfl_jax.fed.core.types import Aggregate, Array, Cohort, GatheredUpdates, Metrics, Tree
from fmfl_jax.parallel import AXIS


class ClientOutput(NamedTuple):
    """What one client's pass gives. update: pytree. metrics: dict of float32. report: pytree, kept for each client.
    contributes: bool, the update is there and finite (an earlier one that stands in for a lost one contributes).
    valid: bool, the client itself was delivered and finite: its metrics count. weight: float32, of the update."""

    update: Tree
    metrics: Metrics
    report: Tree
    contributes: Array
    valid: Array
    weight: Array


ClientFn = Callable[[Cohort], ClientOutput]


def over_clients(
    client_fn: ClientFn, cohort: Cohort, clients_per_pass: int | None, reduce: Callable[[ClientOutput, Cohort], Any]
):
    """Runs client_fn(one client's part of the cohort) for all clients of this device: (sum, rest [C, ...]).

    The clients go through client_fn together (vmap: one pass over the frozen weights for all), `clients_per_pass` at a
    time where that is given. reduce(ClientOutput [P, ...], the pass's part of the cohort [P, ...]) -> (summand, rest of
    the pass): the summands are added up over the passes, so that memory holds one pass and one running sum.

    Raises ValueError when clients_per_pass does not divide the device's clients.
    """
    num_clients = cohort.client_ids.shape[0]
    per_pass = num_clients if clients_per_pass is None else min(clients_per_pass, num_clients)
    if num_clients % per_pass:
        raise ValueError(f"clients_per_pass {per_pass} does not divide the {num_clients} clients of a device")
    cohort = cohort._replace(server_batches=None)

    def one_pass(group: Cohort):
        if per_pass == 1:  # no vmap: a loop over one client's number of steps stays a loop
            output = client_fn(jax.tree.map(lambda x: x[0], group))
            output = jax.tree.map(lambda x: x[None], output)
        else:
            output = jax.vmap(client_fn)(group)
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


def mean_over_clients(client_fn: ClientFn, cohort: Cohort, clients_per_pass: int | None):
    """(Aggregate, counts, reports [C, ...]): the weighted mean over all clients of all devices.

    A client whose update does not contribute gets weight and denominator 0: what is not finite never reaches the model.
    The update is 0 where all denominators are. counts: {"dropped_clients": with a weight, delivered but not finite,
    "counted_clients": valid and with a weight, "attackers": those of them that are malicious, where that is known}.
    """

    def reduce(output: ClientOutput, group: Cohort):
        weights = jnp.where(output.contributes, output.weight, 0.0)
        return (weighted_sum(output.update, weights), _sums(output, group, weights)), output.report

    (update, sums), reports = over_clients(client_fn, cohort, clients_per_pass, reduce)
    update, sums = jax.lax.psum((update, sums), AXIS)
    return _aggregate(divided(update, sums["denominator"]), sums), sums["counts"], reports


def gather_over_clients(client_fn: ClientFn, cohort: Cohort, clients_per_pass: int | None):
    """(GatheredUpdates without a reference, Aggregate without an update, counts, reports [C, ...]): every update, on
    every device."""

    def reduce(output: ClientOutput, group: Cohort):
        weights = jnp.where(output.contributes, output.weight, 0.0)
        updates = jax.tree.map(lambda x: jnp.where(beside(weights > 0, x), x, jnp.zeros_like(x)), output.update)
        return _sums(output, group, weights), (output.report, updates, weights, _denominators(output, group))

    sums, (reports, *mine) = over_clients(client_fn, cohort, clients_per_pass, reduce)
    sums = jax.lax.psum(sums, AXIS)
    gather = lambda x: jax.lax.all_gather(x, AXIS, tiled=True)
    updates, weights, denominators, extras, ids = jax.tree.map(gather, (*mine, cohort.extras, cohort.client_ids))
    gathered = GatheredUpdates(updates, weights, denominators, extras, client_ids=ids)
    return gathered, _aggregate(None, sums), sums["counts"], reports


def weighted_sum(tree: Tree, weights) -> Tree:
    """sum_c weights_c x_c over leaves [C, ...] -> [...]; what has weight 0 may be anything (0 * nan is nan)."""

    def one(leaf):
        mask = beside(weights, leaf)
        return jnp.sum(jnp.where(mask > 0, mask * leaf, jnp.zeros_like(leaf)), axis=0)

    return jax.tree.map(one, tree)


def divided(tree: Tree, total) -> Tree:
    """tree / total, or the tree where total is 0."""
    safe = jnp.where(total > 0, total, 1.0)
    return jax.tree.map(lambda x: x / safe, tree)


def gathered_mean(gathered: GatheredUpdates) -> Tree:
    """The weighted mean of gathered updates."""
    return divided(weighted_sum(gathered.updates, gathered.weights), jnp.sum(gathered.denominators))


def beside(per_client, leaf):
    """[C] -> [C, 1, ...] to stand beside a leaf [C, ...]."""
    return per_client.reshape(-1, *(1,) * (leaf.ndim - 1))


def _sums(output: ClientOutput, group: Cohort, weights) -> dict:
    assert group.delivered is not None  # cohort.lay_out fills it in
    valid = jnp.where(output.valid, weights, 0.0)
    weighty = group.weights > 0
    counts = {
        "dropped_clients": group.delivered & ~output.valid & weighty,
        "counted_clients": output.valid & weighty,
    }
    if "malicious" in group.extras:
        counts["attackers"] = counts["counted_clients"] & group.extras["malicious"]
    return {
        "metrics": weighted_sum(output.metrics, valid),
        "valid": jnp.sum(valid),
        "weight": jnp.sum(weights),
        "denominator": jnp.sum(_denominators(output, group)),
        "counts": {name: jnp.sum(them.astype(jnp.float32)) for name, them in counts.items()},
    }


def _denominators(output: ClientOutput, group: Cohort):
    """A client that was delivered but is not finite leaves the denominator too; one that was lost may stay in it."""
    assert group.delivered is not None and group.denominators is not None  # cohort.lay_out fills them in
    return jnp.where(group.delivered & ~output.contributes, 0.0, group.denominators)


def _aggregate(update, sums: dict) -> Aggregate:
    return Aggregate(update, divided(sums["metrics"], sums["valid"]), sums["weight"], sums["denominator"])
