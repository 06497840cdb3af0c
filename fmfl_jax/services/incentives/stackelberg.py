"""Stackelberg games of the foundation model's market: who sells moves first, who buys answers (section V of the paper).

    the service         buyer i takes q_i = argmax w_i ln(1 + q) - p q = max(w_i / p - 1, 0), the vendor sets
                        p = argmax (p - c) sum_i q_i(p)
    participation       client i works t_i = argmax R t / (t + sum of the others' t) - k_i t, the server sets R

The first is the usual pricing of log-utility buyers, with the prefixes of buyers that the interior formula
p = sqrt(c mean w) leaves out; the second is a contest of Tullock with unequal costs, as in Yang, Xue, Fang, Tang
(MobiCom 2012, section 4), with a bound on each client's effort.

    >>> price_service([2, 3, 5, 8], unit_cost_usd=0.5).price_usd        # 1.5
    >>> effort_equilibrium(6.0, [0.5, 0.8, 0.9, 1.4, 3.0]).effort       # [2.975, 1.488, 0.992, 0, 0]
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fmfl_jax.services.checks import at_least, positive, vector

_GRID = 65  # rewards that the leader's optimum is looked for between


class ServicePrice(NamedTuple):
    """price_usd of a unit; amounts [n] that the buyers take; profit_usd of the vendor."""

    price_usd: float
    amounts: np.ndarray
    profit_usd: float


class Effort(NamedTuple):
    """An equilibrium: effort [n], its sum, and utility_usd [n] of the clients. unit_usd: what a unit of effort is paid,
    reward / total."""

    effort: np.ndarray
    total: float
    unit_usd: float
    utility_usd: np.ndarray


class Leader(NamedTuple):
    """The server's choice: reward_usd, the clients' answer, and its profit_usd."""

    reward_usd: float
    answer: Effort
    profit_usd: float


def demand(willingness_usd, price_usd: float) -> np.ndarray:
    """What buyers of utility w ln(1 + q) - p q take at a price: float64 [n]."""
    positive(price_usd=price_usd)
    return np.maximum(vector("willingness_usd", willingness_usd) / price_usd - 1, 0.0)


def price_service(willingness_usd, *, unit_cost_usd: float) -> ServicePrice:
    """The vendor's best price over all prefixes of the buyers by willingness.

    From the k most willing the profit is concave in p, so that the best price at which all of them buy is the lesser of
    sqrt(c mean of their w) and the k-th's w. Others who buy at it too only add, so that the best k is the best price of
    all. Raises ValueError for a cost of 0 (the best price would be the
    lowest one above it), willingness that is not positive, and where nobody is willing to pay the cost.
    """
    willing = vector("willingness_usd", willingness_usd)
    positive(unit_cost_usd=unit_cost_usd)
    if not len(willing) or willing.min() <= 0:
        raise ValueError("willingness_usd must be positive numbers, one for each buyer")
    order = np.sort(willing)[::-1]
    if order[0] <= unit_cost_usd:
        raise ValueError(f"nobody buys: the most willing pays {order[0]:g} a unit, which costs {unit_cost_usd:g}")
    sums, counts = np.cumsum(order), np.arange(1, len(order) + 1)
    prices = np.minimum(np.sqrt(unit_cost_usd * sums / counts), order)
    profits = (prices - unit_cost_usd) * (sums / prices - counts)
    best = int(np.argmax(profits))
    price = float(prices[best])
    return ServicePrice(price, demand(willing, price), float(profits[best]))


def effort_equilibrium(reward_usd: float, cost_usd, *, most: float = math.inf) -> Effort:
    """The Nash equilibrium of clients that share a reward by effort.

    cost_usd: [n] of a unit of effort, inf for a client that cannot take part. most: the most effort of any client.
    The equilibrium is unique: every client's share min(1 - k_i T / R, most / T) falls in the total T, and at the
    equilibrium's the shares add up to 1. Without the bound T = (m - 1) R / sum of the m cheapest clients' k, m the
    largest with k_m < that sum / (m - 1).

    Raises ValueError for fewer than two clients that can take part (one alone would work as little as it likes), costs
    that are not positive, and a reward or a bound that is not.
    """
    from scipy import optimize  # slow to import, and only incentives need it

    costs = np.asarray(cost_usd, np.float64)
    positive(reward_usd=reward_usd, most=most)
    if costs.ndim != 1 or not np.all(costs > 0):
        raise ValueError("cost_usd must be positive numbers, one for each client")
    able = np.sort(costs[np.isfinite(costs)])
    if len(able) < 2:
        raise ValueError(f"a reward that is shared by effort needs two clients that can take part, got {len(able)}")
    total = _unbounded_total(reward_usd, able)

    def surplus(total: float) -> float:
        shares = np.minimum(np.maximum(1 - able * (total / reward_usd), 0), most / total)
        return float(shares.sum()) - 1

    if total > most and surplus(total) < -1e-12:  # the bound holds somebody back
        total = float(optimize.brentq(surplus, most, total, xtol=1e-15 * total, rtol=1e-14))  # pyright: ignore
    with np.errstate(invalid="ignore"):  # of clients that cannot take part: 0 x inf
        effort = np.clip(np.where(np.isfinite(costs), total - costs * (total * total / reward_usd), 0), 0, most)
        utility = np.where(effort > 0, effort * (reward_usd / total - costs), 0.0)
    return Effort(effort, float(effort.sum()), reward_usd / total, utility)


def _unbounded_total(reward: float, costs: np.ndarray) -> float:
    """T without a bound on the effort; costs sorted."""
    sums, before = np.cumsum(costs), np.arange(len(costs))  # before: m - 1
    active = int(np.flatnonzero(costs * before < sums)[-1])  # holds for a prefix, of two at least
    return active * reward / float(sums[active])


def best_reward(value: Callable[[np.ndarray], float], cost_usd, *, most: float = math.inf) -> Leader:
    """The reward that maximizes value(effort [n]) - reward over the clients' equilibria.

    value: in USD, such as 10 ln(1 + sum ln(1 + t_i)). It is looked for on a grid of rewards, then refined by a bounded
    search beside the grid's best: a value with several peaks closer than the grid may hide the best one. Raises
    ValueError where no reward pays, and where profit grows without an end.
    """
    from scipy import optimize  # as above

    def profit(reward: float) -> float:
        return float(value(effort_equilibrium(reward, cost_usd, most=most).effort)) - reward

    costs = np.asarray(cost_usd, np.float64)
    high = float(costs[np.isfinite(costs)].sum())
    positive(sum_of_cost_usd=high)
    for _ in range(200):
        if profit(2 * high) <= profit(high):
            break
        high *= 2
    else:
        raise ValueError("the server's profit grows with the reward without an end: its value must have an end")
    grid = 2 * high * np.arange(1, _GRID + 1) / _GRID
    best = int(np.argmax([profit(reward) for reward in grid]))
    bounds = (grid[best - 1] if best else grid[0] * 1e-9, grid[min(best + 1, _GRID - 1)])
    found = optimize.minimize_scalar(lambda reward: -profit(reward), bounds=bounds, options={"xatol": 1e-10 * high})
    reward = float(found.x)  # pyright: ignore[reportAttributeAccessIssue]
    if not profit(reward) > float(value(np.zeros(len(costs)))) + 1e-9 * reward:
        raise ValueError("no reward pays: the clients' work is worth less to the server than it costs them")
    return Leader(reward, effort_equilibrium(reward, cost_usd, most=most), profit(reward))


def log_value(gain_usd: float) -> Callable[[np.ndarray], float]:
    """gain ln(1 + sum ln(1 + t_i)): more work and more workers, with falling returns (Yang et al., equation 8)."""
    at_least(0, gain_usd=gain_usd)
    return lambda effort: gain_usd * math.log1p(float(np.log1p(effort).sum()))
