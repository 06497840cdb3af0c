"""FLoRA (Wang et al., NeurIPS 2024): the clients' factors are stacked and added to the base; each round has fresh ones.

    W <- W + scale [w_1 A_1, ..., w_C A_C] [B_1; ...; B_C] = W + scale sum_c w_c A_c B_c,   w_c = n_c / sum_c n_c

The sum is exact for clients of any ranks. The server's parameters are the base's adapted matrices as dense arrays
beside the factors, whose B is always zero: so a 4-bit base, which cannot take the sum, cannot be trained this way, and
there is no server optimizer on the stacked factors, which belong to one round only. Clients differentiate and send
factors; they get the stack of all. dW = scale A B with one scale for all ranks, as in the published code, where alpha
is twice the rank.

    >>> algorithm = flora(grad_fn, optax.sgd(0.1), targets, scale=2.0)
    >>> state = algorithm.init(factors | weights, seed=0)
    >>> context = ClientContext(algorithm.broadcast(state), frozen, (), client_id, weight, None, key)
    >>> factors = run_client(algorithm.client, context, batches).update
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax import streams
from fmfl_jax.fed.algorithms.lora.factors import (
    HIGHEST,
    Factors,
    Pair,
    factor_bits,
    full_rank,
    has_columns,
    joint_norm,
    keep_rank,
    shares_of,
    stack_factors,
    traced_bits,
)
from fmfl_jax.fed.algorithms.lora.ranked import check_ranks, factors_phase
from fmfl_jax.fed.core.client import start_training
from fmfl_jax.fed.core.types import (
    ClientResult,
    ClientUpdate,
    FederatedAlgorithm,
    GatheredUpdates,
    GradFn,
    Optimizer,
    Phase,
    ServerState,
    Traffic,
)


class Target(NamedTuple):
    """Factors a [D, R] and b [R, stop - start] belong to the columns [start, stop) of the matrix `weight`."""

    a: str
    b: str
    weight: str
    start: int
    stop: int


def flora(
    grad_fn: GradFn,
    client_optimizer: Optimizer,
    targets: tuple[Target, ...],
    *,
    scale: float,
    ranks: tuple[int, ...] | None = None,
) -> FederatedAlgorithm:
    """The algorithm. Its parameters are the factors of `targets`, all of one rank R, and their weights.

    grad_fn(factors, frozen, batch, key) -> (loss, grad): `frozen`, a dict, is the round's with the weights added, and
    only factors are differentiated; `split_params` makes the same two parts for evaluation. Weights are best float32:
    small sums vanish in bfloat16. scale: the model's alpha / R. ranks: of every client, by client id; None: R. A
    client's A is drawn anew from (seed, round, client), as published. What the factors are at the start is added to the
    weights. With denominators above the weights' sum (lost clients that stay in the mean) the sum shrinks accordingly:
    B starts at 0, so it is a mean of changes. Client metrics: "payload_bits" of the client's rank. Metrics:
    "download_bits", of the round's stack, which every client fetches; "delta_norm", of the change of all weights.
    `init` raises ValueError for other parameters and for ranks outside 1...R.
    """
    pairs = tuple(Pair(target.a, target.b) for target in targets)

    def aggregate(gathered: GatheredUpdates, key):
        del key
        shares = shares_of(gathered.weights, jnp.sum(gathered.denominators))
        update = {}
        for pair in pairs:
            update[pair.a], update[pair.b] = stack_factors(gathered.updates[pair.a], gathered.updates[pair.b], shares)
        norm = scale * joint_norm([Factors(update[pair.a], update[pair.b]) for pair in pairs])
        rank = jnp.sum(has_columns(update[pairs[0].a]).astype(jnp.int32))  # of all that are there together
        return update, {"delta_norm": norm, "download_bits": traced_bits(factors_of(gathered.params), pairs, rank)}

    def init(params, seed):
        factors, _ = split_params(params, targets)
        check_ranks(ranks, full_rank(factors, pairs))
        zeros = {pair.b: jnp.zeros_like(params[pair.b]) for pair in pairs}
        return ServerState(
            added(params, factors, targets, scale) | zeros, (), jnp.zeros((), jnp.int32), jnp.uint32(seed)
        )

    def factors_of(params):
        return split_params(params, targets)[0]

    def traffic(state, client_ids, client_states, cohort_size):
        # The download is the round's stack of all factors; a client that was away needs those of the rounds it missed.
        full = np.full(len(client_ids), full_rank(factors_of(state.params), pairs))
        uplink = factor_bits(state.params, pairs) * (full if ranks is None else np.asarray(ranks)[client_ids])
        return Traffic(uplink.astype(np.int64), round(cohort_size * float(uplink.mean())))

    return FederatedAlgorithm(
        init=init,
        client=_client(grad_fn, client_optimizer, targets, ranks),
        server=lambda state, aggregate: state._replace(params=added(state.params, aggregate.update, targets, scale)),
        aggregate=aggregate,
        update_like=factors_of,
        traffic=traffic,
    )


def _client(
    grad_fn: GradFn, optimizer: Optimizer, targets: tuple[Target, ...], ranks: tuple[int, ...] | None
) -> ClientUpdate:
    """Fresh factors of the client's rank, trained beside the weights that the server sent."""
    pairs = tuple(Pair(target.a, target.b) for target in targets)

    def rank_of(context):
        factors, _ = split_params(context.message, targets)
        return (
            jnp.int32(full_rank(factors, pairs)) if ranks is None else jnp.asarray(ranks, jnp.int32)[context.client_id]
        )

    def begin(context):
        factors, _ = split_params(context.message, targets)
        key = jax.random.fold_in(context.key, streams.FRESH_FACTORS)
        start = keep_rank(fresh_factors(factors, pairs, key), pairs, rank_of(context))
        return start, start_training(optimizer, start)

    factors_step = factors_phase(grad_fn, optimizer, rank_of).step

    def step(context, work, batch, key):
        _, weights = split_params(context.message, targets)
        return factors_step(context._replace(frozen=context.frozen | weights), work, batch, key)

    def finish(context, work, metrics):
        start, training = work
        bits = traced_bits(start, pairs, rank_of(context))
        return ClientResult(training.params, context.weight, (), metrics | {"payload_bits": bits})

    return ClientUpdate(begin=begin, phases=(Phase(step=step),), finish=finish)


def split_params(params: dict, targets: tuple[Target, ...]) -> tuple[dict, dict]:
    """(factors, weights) of the server's parameters. Raises ValueError where names are missing or there are others."""
    factors = {name for target in targets for name in (target.a, target.b)}
    weights = {target.weight for target in targets}
    if wrong := (factors | weights) ^ set(params):
        raise ValueError(f"FLoRA's parameters are its targets' factors and weights: {min(wrong)} is not in both")
    return {name: params[name] for name in factors}, {name: params[name] for name in weights}


def fresh_factors(factors: dict, pairs: tuple[Pair, ...], key) -> dict:
    """New factors of the same shapes, float32: A uniform in +-1/sqrt(D), B zero."""
    fresh = {}
    for i, pair in enumerate(pairs):
        shape = factors[pair.a].shape
        bound = 1 / math.sqrt(shape[0])
        fresh[pair.a] = jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32, -bound, bound)
        fresh[pair.b] = jnp.zeros(factors[pair.b].shape, jnp.float32)
    return fresh


def added(params: dict, factors: dict, targets: tuple[Target, ...], scale: float) -> dict:
    """`params` with scale A B added to the targets' columns, for factors [D, K] and [K, F] of any rank K."""
    new = dict(params)
    for target in targets:
        delta = scale * jnp.matmul(factors[target.a], factors[target.b], precision=HIGHEST)
        weight = new[target.weight]
        new[target.weight] = weight.at[:, target.start : target.stop].add(delta.astype(weight.dtype))
    return new
