"""FLoRA (Wang et al., NeurIPS 2024): the clients' factors are stacked and added to the base; each round has fresh ones.

    W <- W + scale [w_1 A_1, ..., w_C A_C] [B_1; ...; B_C] = W + scale sum_c w_c A_c B_c,   w_c = n_c / sum_c n_c

The sum is exact for clients of any ranks. The server's parameters are the base's adapted matrices as dense arrays
beside the factors, whose B is always zero: so a 4-bit base, which cannot take the sum, cannot be trained this way, and
there is no server optimizer on the stacked factors, which belong to one round only. Clients differentiate and send
factors; they get the stack of all. dW = scale A B with one scale for all ranks, as in the published code, where alpha
is twice the rank.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

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
from fmfl_jax.fed.algorithms.lora.ranked import check_ranks, with_own_aggregator
from fmfl_jax.fed.core.client import local_update
from fmfl_jax.fed.core.round import make_algorithm
from fmfl_jax.fed.core.types import Aggregator, ClientResult, Delivery, FederatedAlgorithm, Stack

_FRESH = 2**31 - 5  # folded into a client's key; local steps stay below


class Target(NamedTuple):
    """Factors a [D, R] and b [R, stop - start] belong to the columns [start, stop) of the matrix `weight`."""

    a: str
    b: str
    weight: str
    start: int
    stop: int


def flora(
    grad_fn: Callable,
    client_optimizer: optax.GradientTransformation,
    targets: tuple[Target, ...],
    *,
    scale: float,
    ranks: tuple[int, ...] | None = None,
    delivery: Delivery = Delivery(),
) -> FederatedAlgorithm:
    """The algorithm. Its parameters are the factors of `targets`, all of one rank R, and their weights.

    grad_fn(factors, frozen, batch, key) -> (loss, grad): `frozen`, a dict, is the round's with the weights added, and
    only factors are differentiated; `split_params` makes the same two parts for evaluation. Weights are best float32:
    small sums vanish in bfloat16. scale: the model's alpha / R. ranks: of every client, by client id; None: R.
    A client's A is drawn anew from (seed, round, client), as published. What the factors are at the start is added to
    the weights. With normalizers above the weights' sum (lost clients that stay in the mean) the sum shrinks
    accordingly: B starts at 0, so it is a mean of changes. Scalars: "payload_bits" of the client's rank. Metrics:
    "download_bits", of the round's stack, which every client fetches; "delta_norm", of the change of all weights.
    Raises ValueError for other parameters, ranks outside 1...R, and what `with_own_aggregator` refuses.
    """
    pairs = tuple(Pair(target.a, target.b) for target in targets)

    def client(state, frozen, own, key) -> ClientResult:
        factors, weights = split_params(state.params, targets)
        largest = full_rank(factors, pairs)
        rank = jnp.int32(largest) if ranks is None else jnp.asarray(ranks, jnp.int32)[own.client_ids]
        start = keep_rank(fresh_factors(factors, pairs, jax.random.fold_in(key, _FRESH)), pairs, rank)
        update = local_update(
            grad_fn,
            client_optimizer,
            start,
            frozen | weights,
            own.batches,
            key,
            adjust=lambda grad, params: keep_rank(grad, pairs, rank),  # a private gradient has noise
            num_steps=own.extras.get("num_steps"),
        )
        message = {name: start[name] - update.delta[name] for name in start}
        return ClientResult(message, {"loss": update.loss, "payload_bits": traced_bits(start, pairs, rank)})

    def combine(stack: Stack, state, key):
        shares = shares_of(stack.weights, jnp.sum(stack.normalizers))
        update = {}
        for pair in pairs:
            update[pair.a], update[pair.b] = stack_factors(stack.messages[pair.a], stack.messages[pair.b], shares)
        norm = scale * joint_norm([Factors(update[pair.a], update[pair.b]) for pair in pairs])
        rank = jnp.sum(has_columns(update[pairs[0].a]).astype(jnp.int32))  # of all that are heard together
        return update, {"delta_norm": norm, "download_bits": traced_bits(message_like(stack.params), pairs, rank)}

    def server(state, update):
        return added(state.params, update, targets, scale), (), ()

    def init_server(params):
        factors, _ = split_params(params, targets)
        check_ranks(ranks, full_rank(factors, pairs))
        zeros = {pair.b: jnp.zeros_like(params[pair.b]) for pair in pairs}
        return added(params, factors, targets, scale) | zeros, (), ()

    def message_like(params):
        return split_params(params, targets)[0]

    delivery = with_own_aggregator(delivery, Aggregator(combine=combine), "FLoRA")
    return make_algorithm(
        client,
        server,
        init_server=init_server,
        message_like=message_like,
        delivery=delivery,
        download=lambda params, extra: message_like(params),
    )


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


def flora_bits(params: dict, targets: tuple[Target, ...], ranks: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """(uplink bits of each client, downlink bits of every client) of a round in which clients of these ranks are heard.

    The download is the round's stack of all factors. A client that was away needs the stacks of the rounds it missed.
    """
    pairs = tuple(Pair(target.a, target.b) for target in targets)
    uplink = tuple(factor_bits(params, pairs, rank) for rank in ranks)
    return uplink, sum(uplink)
