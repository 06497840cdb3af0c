"""What the algorithms share whose clients send their factors themselves, not a delta: their aggregator is their own."""

import dataclasses

from fmfl_jax.fed.algorithm import Aggregator, Delivery


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
