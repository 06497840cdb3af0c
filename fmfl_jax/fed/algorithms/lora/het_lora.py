"""HetLoRA (Cho et al., EMNLP 2024): clients of different ranks, zero-padded, weighted by their norm, truncated.

    start: the first r_k columns of A and rows of B;     A <- sum_k p_k A_k, B <- sum_k p_k B_k,  p_k ~ |A_k B_k|
    objective: L_k + lambda |A_k[:, g:]| |B_k[g:]|,  g = floor(gamma r_k)
    after training, if that product is smaller than it was at the start, the client drops the ranks from g on

Sums and norms are over all adapted matrices: one rank, one weight and one decision for a client. The number of examples
does not count, a weight of 0 is absent. The published global modules have the largest rank of the cohort; the columns
beyond it stay here as they were, instead of becoming zeros that no gradient would ever leave. One scale for all ranks:
see flex_lora.py.

    >>> algorithm = het_lora(grad_fn, optax.sgd(0.1), gamma=0.99, regularization=5e-3, ranks=(2, 4, 8))
    >>> rank = algorithm.init_client(params, client_id)
    >>> context = ClientContext(algorithm.broadcast(state), frozen, rank, client_id, weight, None, key)
    >>> factors, weight, rank, metrics = run_client(algorithm.client, context, batches)
"""

import math

import jax
import jax.numpy as jnp
import optax

from fmfl_jax.fed.algorithms.lora.factors import (
    Factors,
    difference,
    full_rank,
    has_columns,
    joint_norm,
    keep_rank,
    pairs_of,
    relative_distance,
    shares_of,
    stack_factors,
    traced_bits,
)
from fmfl_jax.fed.algorithms.lora.ranked import factors_phase, ranked_factors, start_factors
from fmfl_jax.fed.core.types import (
    ClientResult,
    ClientUpdate,
    FederatedAlgorithm,
    GatheredUpdates,
    GradFn,
    Optimizer,
)


def het_lora(
    grad_fn: GradFn,
    client_optimizer: Optimizer,
    *,
    gamma: float,
    regularization: float,
    ranks: tuple[int, ...] | None = None,
) -> FederatedAlgorithm:
    """The algorithm. Its parameters are LoRA factors of one rank R and nothing else; a client keeps its present rank.

    gamma: in (0, 1], what pruning leaves of a rank; 1 prunes nothing. regularization: lambda. ranks: each client's at
    the start, by client id; None: R. Client metrics: "payload_bits" of the rank that is sent, "download_bits" of the
    rank at the start, "rank". Metrics: "aggregation_bias" against the mean of the matrices weighted by examples;
    "delta_norm", of the change of all A B.
    Raises ValueError for numbers out of range; `init` for other parameters and for ranks outside 1...R.
    """
    if not 0 < gamma <= 1 or regularization < 0:
        raise ValueError(f"HetLoRA needs gamma in (0, 1] and regularization >= 0, got {gamma} and {regularization}")

    def smaller_rank(params, rank):
        table = [pruned_rank(r, gamma) for r in range(full_rank(params, pairs_of(params)) + 1)]
        return jnp.asarray(table, jnp.int32)[rank]

    def pull(params, rank):
        pairs = pairs_of(params)
        smaller = smaller_rank(params, rank)
        return optax.tree.scale(regularization, jax.grad(lambda p: tail_norm(p, pairs, smaller))(params))

    def begin(context):
        return start_factors(client_optimizer, context.message, context.state)

    def finish(context, work, metrics):
        (start, training), rank, pairs = work, context.state, pairs_of(context.message)
        smaller = smaller_rank(start, rank)
        end = training.params
        pruned = tail_norm(end, pairs, smaller) < tail_norm(start, pairs, smaller)
        kept = jnp.where(pruned, smaller, rank)
        metrics = metrics | {
            "payload_bits": traced_bits(start, pairs, kept),
            "download_bits": traced_bits(start, pairs, rank),
            "rank": kept.astype(jnp.float32),
        }
        return ClientResult(keep_rank(end, pairs, kept), context.weight, kept, metrics)

    steps = factors_phase(grad_fn, client_optimizer, lambda context: context.state, pull)
    client = ClientUpdate(begin=begin, phases=(steps,), finish=finish)
    return ranked_factors(client, norm_weighted_mean, ranks=ranks, prunes=True)


def pruned_rank(rank: int, gamma: float) -> int:
    """floor(gamma rank), but at least 1; gamma rank that is whole up to rounding counts as whole."""
    return max(1, math.floor(gamma * rank + 1e-9))


def tail_norm(params: dict, pairs, first):
    """sum over the pairs of |A[:, first:]| |B[first:]|; its gradient is 0 where a norm is 0."""
    total = jnp.float32(0)
    for pair in pairs:
        tail = jnp.arange(params[pair.a].shape[1], dtype=jnp.int32) >= first
        a, b = params[pair.a], params[pair.b]
        total += _norm(jnp.where(tail[None, :], a, 0.0)) * _norm(jnp.where(tail[:, None], b, 0.0))
    return total


def norm_weighted_mean(gathered: GatheredUpdates, key):
    """(the server's new factors, metrics) of the clients' factors."""
    del key
    pairs = pairs_of(gathered.params)

    def size(factors):
        return joint_norm([Factors(factors[pair.a], factors[pair.b]) for pair in pairs])

    present = (gathered.weights > 0).astype(jnp.float32)
    sizes = present * jax.vmap(size)(gathered.updates)
    sizes = jnp.where(jnp.sum(sizes) > 0, sizes, present)  # nobody has moved: all the same
    shares, examples = (shares_of(x, jnp.sum(x)) for x in (sizes, gathered.weights))
    update, changes, made, exact = {}, [], [], []
    for pair in pairs:
        a, b = gathered.updates[pair.a], gathered.updates[pair.b]
        before = Factors(gathered.params[pair.a], gathered.params[pair.b])
        covered = jnp.any(has_columns(a) & (shares > 0)[:, None], axis=0)
        now = Factors(
            jnp.where(covered[None, :], jnp.sum(shares[:, None, None] * a, axis=0), before.a),
            jnp.where(covered[:, None], jnp.sum(shares[:, None, None] * b, axis=0), before.b),
        )
        update[pair.a], update[pair.b] = now
        changes.append(difference(now, before))
        made.append(now)
        exact.append(stack_factors(a, b, examples))
    return update, {"aggregation_bias": relative_distance(made, exact), "delta_norm": joint_norm(changes)}


def _norm(x):
    squares = jnp.sum(x * x)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
