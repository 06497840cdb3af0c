"""Auctions of a divisible resource to bidders that want a fixed amount each: bandwidth, tokens, memory.

Bidder i wants size_i (MHz) and values it at v_i; the sizes of those who win must fit the capacity. The Vickrey-Clarke-
Groves mechanism gives it to the set of the largest value and asks of a winner what its presence costs the others:

    pay_i = (others' welfare without i) - (others' welfare with i)

which makes the true value the best bid, whatever the others do, but only where the set is exactly the best one. Greedy
sets with VCG payments are not truthful; with critical values (the least bid that still wins) they are (Lehmann,
O'Callaghan, Shoham, JACM 2002).

    >>> vcg([6, 5, 4, 3], [3, 2, 2, 1], capacity=5)       # winners 2, 3, 4; welfare 12; payments 3, 3, 2
"""

from typing import NamedTuple

import numpy as np

from fmfl_jax.services.checks import at_least, same_length, vector

_MOST_STATES = 2_000_000  # of the exact knapsack at a time


class Sale(NamedTuple):
    """winners: bool [n]. payments_usd: float64 [n], 0 for the others. welfare_usd: the winners' bids together."""

    winners: np.ndarray
    payments_usd: np.ndarray
    welfare_usd: float


def knapsack(values, sizes, capacity: float) -> np.ndarray:
    """Of the sets whose sizes fit the capacity the one of the largest value, exactly: bool [n].

    Nemhauser and Ullmann's list of the sets that no other dominates (as small and as valuable), without those that
    could not reach greedy's value any more. Sizes and values are any numbers of 0 or more. Raises ValueError for
    others, and where the list grows beyond two million sets (equal densities, no two sizes alike): `greedy` serves.
    """
    values, sizes = _bids(values, sizes, capacity)
    order = np.argsort(-_density(values, sizes), kind="stable")
    values_of, sizes_of = values[order], sizes[order]
    still = np.append(np.cumsum(values_of[::-1])[::-1], 0.0)  # what the items from here on are worth
    least = float(values[_greedy_set(values, sizes, capacity)].sum()) * (1 - 1e-12)
    value, size, steps = np.zeros(1), np.zeros(1), []
    for i in range(len(order)):
        new_size = size + sizes_of[i]
        fits = np.flatnonzero(new_size <= capacity)
        all_size = np.concatenate([size, new_size[fits]])
        all_value = np.concatenate([value, value[fits] + values_of[i]])
        parent = np.concatenate([np.arange(len(size)), fits])
        ranked = np.lexsort((-all_value, all_size))
        reached = np.maximum.accumulate(all_value[ranked])
        kept = ranked[np.append(True, reached[1:] > reached[:-1])]
        kept = kept[all_value[kept] + still[i + 1] >= least]
        steps.append((parent[kept], kept >= len(size)))
        value, size = all_value[kept], all_size[kept]
        if len(value) > _MOST_STATES:
            raise ValueError(f"the best of {len(values)} bids is out of reach: use greedy with its critical values")
    chosen, state = np.zeros(len(values), bool), int(np.argmax(value))
    for i in range(len(order) - 1, -1, -1):
        parents, taken = steps[i]
        chosen[order[i]], state = taken[state], int(parents[state])
    return chosen


def vcg(values_usd, sizes, *, capacity: float) -> Sale:
    """The Vickrey-Clarke-Groves auction over the exact knapsack. Raises ValueError as `knapsack` does."""
    values, sizes = _bids(values_usd, sizes, capacity)
    winners = knapsack(values, sizes, capacity)
    welfare, payments = float(values[winners].sum()), np.zeros(len(values))
    for i in np.flatnonzero(winners):
        others = np.arange(len(values)) != i
        without = values[others][knapsack(values[others], sizes[others], capacity)].sum()
        payments[i] = max(float(without) - float(values[winners & others].sum()), 0.0)  # 0 but for rounding
    return Sale(winners, payments, welfare)


def greedy(values_usd, sizes, *, capacity: float) -> Sale:
    """By value per size, whoever still fits; a winner pays its critical value: what it must bid to come before the
    bidder whose turn leaves too little room for it. Equal densities go by the bidders' order."""
    values, sizes = _bids(values_usd, sizes, capacity)
    winners = _greedy_set(values, sizes, capacity)
    payments = np.zeros(len(values))
    for i in np.flatnonzero(winners):
        others = np.flatnonzero(np.arange(len(values)) != i)
        payments[i] = _critical_value(values[others], sizes[others], float(sizes[i]), capacity)
    return Sale(winners, payments, float(values[winners].sum()))


def _critical_value(values: np.ndarray, sizes: np.ndarray, size: float, capacity: float) -> float:
    """The least bid that wins `size` against the others."""
    room, density = capacity, _density(values, sizes)
    for j in np.argsort(-density, kind="stable"):
        if sizes[j] <= room:
            room -= sizes[j]
            if room < size:
                return float(density[j]) * size
    return 0.0


def _greedy_set(values: np.ndarray, sizes: np.ndarray, capacity: float) -> np.ndarray:
    chosen, room = np.zeros(len(values), bool), capacity
    for i in np.argsort(-_density(values, sizes), kind="stable"):
        if sizes[i] <= room:
            chosen[i] = True
            room -= sizes[i]
    return chosen


def _density(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return np.divide(values, sizes, out=np.full(len(values), np.inf), where=sizes > 0)


def _bids(values, sizes, capacity: float) -> tuple[np.ndarray, np.ndarray]:
    values, sizes = vector("values", values), vector("sizes", sizes)
    same_length(values=values, sizes=sizes)
    at_least(0, values=float(values.min()), sizes=float(sizes.min()), capacity=capacity)
    return values, sizes
