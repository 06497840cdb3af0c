"""What the algorithms share whose clients send their factors themselves, not a delta: their aggregator is their own."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from fmfl_jax.fed.algorithms.lora.factors import full_rank, keep_rank, pairs_of
from fmfl_jax.fed.core.round import make_algorithm
from fmfl_jax.fed.core.types import Aggregator, Delivery, FederatedAlgorithm


def of_ranked_factors(
    client: Callable, combine: Callable, *, ranks: tuple[int, ...] | None, delivery: Delivery, name: str
) -> FederatedAlgorithm:
    """The algorithm whose clients send factors of their own ranks, which are their states, and whose server's new
    factors are what `combine` makes of them."""

    def server(state, update):
        return update, (), ()

    def init_server(params):
        check_ranks(ranks, full_rank(params, pairs_of(params)))
        return params, (), ()

    def init_own(params, client_id):
        return client_rank(ranks, params, client_id)

    def personal(params, rank):
        return keep_rank(params, pairs_of(params), rank)

    delivery = with_own_aggregator(delivery, Aggregator(combine=combine), name)
    return make_algorithm(
        client, server, init_server=init_server, init_own=init_own, personal=personal, delivery=delivery
    )


def with_own_aggregator(delivery: Delivery, aggregator: Aggregator, name: str) -> Delivery:
    """`delivery` with the algorithm's own aggregator.

    Raises ValueError for what needs deltas: another aggregator, an uplink transform (its residual belongs to other
    factors, and its size would count the padding of lower ranks), a last message in place of a lost one.
    """
    if delivery.aggregator != Aggregator():
        raise ValueError(f"{name} aggregates products of factors: it takes no other aggregator")
    if delivery.uplink is not None:
        raise ValueError(f"{name} sends factors of each client's own rank, not deltas: it takes no uplink transform")
    if delivery.substitute_lost:
        raise ValueError(f"{name} sends the factors of one round: the last ones cannot stand in for those of another")
    return dataclasses.replace(delivery, aggregator=aggregator)


def check_ranks(ranks: tuple[int, ...] | None, largest: int) -> None:
    """Raises ValueError where a client's rank is not one of 1...largest."""
    wrong = [rank for rank in ranks or () if not 1 <= rank <= largest]
    if wrong:
        raise ValueError(f"clients' ranks must be from 1 to the model's {largest}, got {wrong[0]}")


def client_rank(ranks: tuple[int, ...] | None, params: dict, client_id):
    """The rank, int32, of one client: `ranks`[client_id], or the parameters' own."""
    if ranks is None:
        return jnp.int32(full_rank(params, pairs_of(params)))
    return jnp.asarray(ranks, jnp.int32)[client_id]
