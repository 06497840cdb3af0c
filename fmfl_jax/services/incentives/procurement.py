"""A server that buys clients' work at a budget: the proportional-share auction (Singer, FOCS 2010).

Client i asks c_i for work that is worth v_i to the server. In the order of c_i / v_i clients are bought as long as

    c_i / v_i <= budget / (v of all bought so far, i among them)

and each is paid the most that it could have asked and still be bought. Asking the true cost is the best a client can
do, nobody loses by taking part, and the payments never exceed the budget.

    >>> buy([1, 2, 3, 9], [1, 1, 1, 1], budget_usd=6)         # the first two, 3 each
"""

from typing import NamedTuple

import numpy as np

from fmfl_jax.services.checks import positive, same_length, vector


class Purchase(NamedTuple):
    """winners: bool [n]. payments_usd: float64 [n], 0 for the others."""

    winners: np.ndarray
    payments_usd: np.ndarray


def buy(asks_usd, values, *, budget_usd: float, most: int | None = None) -> Purchase:
    """Who is bought, and for how much.

    asks_usd: [n], inf for a client that cannot take part. values: [n], above 0. most: how many are bought at most, the
    cheapest for their value; the limit is part of the rule, so it stays truthful. Raises ValueError for asks below 0,
    values that are not positive, and a budget or a limit that is not.
    """
    asks, values = np.asarray(asks_usd, np.float64), vector("values", values)
    num = same_length(asks_usd=asks, values=values)
    most = num if most is None else most
    positive(budget_usd=budget_usd, most=most, values=float(values.min()))
    if asks.ndim != 1 or not np.all(asks >= 0):
        raise ValueError("asks_usd must be numbers of 0 or more, one for each client")
    density = asks / values
    order = np.argsort(density, kind="stable")
    affordable = density[order] * np.cumsum(values[order]) <= budget_usd  # of a prefix: both factors grow
    affordable[most:] = False
    winners, payments = np.zeros(num, bool), np.zeros(num)
    winners[order[affordable]] = True
    for i in np.flatnonzero(winners):
        others = order[order != i]
        payments[i] = max(_most_asked(density[others], values[others], float(values[i]), budget_usd, most), asks[i])
    return Purchase(winners, payments)


def _most_asked(density: np.ndarray, values: np.ndarray, value: float, budget: float, most: int) -> float:
    """The most that a client of this value can ask and be bought beside the others, who stand in their order: in the
    r-th place it must not pass the r-th other, nor its share of the budget."""
    worth = value + np.concatenate([[0.0], np.cumsum(values)])[:most]  # with r - 1 others before it
    ahead_of = np.append(density, np.inf)[:most]
    return float(np.max(np.minimum(ahead_of, budget / worth))) * value
