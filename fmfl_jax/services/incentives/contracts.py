"""Contracts under adverse selection: a menu of (work, reward) for clients whose efficiency only they know (section V).

A client of type theta pays q / theta for work q. The server knows the types' shares p, not who is which, and offers
(q_i, R_i) to each type, theta ascending:

    maximize sum_i p_i (2 a sqrt(q_i) - R_i)
    individual rationality   R_i >= q_i / theta_i
    incentive compatibility  R_i - q_i / theta_i >= R_j - q_j / theta_i

Binding are the rationality of the lowest type and each type's wish to pass for the next lower one (Bolton,
Dewatripont, Contract Theory, 2005, chapter 2), so that R_i = R_{i-1} + (q_i - q_{i-1}) / theta_i and

    sum p_i R_i = sum w_i q_i,   w_i = p_i / theta_i + (1 / theta_i - 1 / theta_{i+1}) sum_{j > i} p_j

Each q_i then is (a p_i / w_i)^2; where these fall from a type to the next, both get one offer (ironing: adjacent types
pooled until the menu rises).

    >>> menu = screening_menu([1, 2, 4], [0.3, 0.4, 0.3])     # q .213, 2.116, 16; R .213, 1.164, 4.635
    >>> choose(menu, cost_per_work_usd=[1, 0.5, 0.25])         # [0, 1, 2]
"""

import dataclasses
import math

import numpy as np

from fmfl_jax.services.checks import positive, same_length, vector

_TIE = 1e-9  # of an offer's reward: two offers this close are alike to a client, which then works more


@dataclasses.dataclass(frozen=True)
class Menu:
    """Offers [L]: so much work for so much reward. Both rise, from offer to offer.

    Raises ValueError where they do not: an offer of less work for more pay leaves nobody who takes the other.
    """

    work: np.ndarray
    reward_usd: np.ndarray

    def __post_init__(self):
        work, reward = vector("work", self.work), vector("reward_usd", self.reward_usd)
        same_length(work=work, reward_usd=reward)
        object.__setattr__(self, "work", work)
        object.__setattr__(self, "reward_usd", reward)
        for name, values in (("work", work), ("reward_usd", reward)):
            falls = np.flatnonzero(np.diff(values) < -_TIE * np.abs(values[:-1]))
            if values.min() < 0 or len(falls):
                at = int(falls[0]) + 1 if len(falls) else 0
                raise ValueError(f"{name} of a menu must be 0 or more and rise, but offer {at} has {values[at]:g}")


def screening_menu(
    theta, shares, *, value_usd: float = 1.0, most: float = math.inf, iron: bool = True, budget_usd: float | None = None
) -> Menu:
    """The server's best menu, an offer for each type.

    theta: [L], ascending, work for a USD. shares: [L] of the types, which add up to 1. value_usd: a, the server's value
    of work. most: the most work that an offer may ask. budget_usd: the most that an offer may cost on average over
    the types (with the value then only its scale: the menu spends the budget where it can, whatever the value).
    iron: False raises ValueError where the menu would fall.

    Raises ValueError for types that do not rise and shares that are no distribution.
    """
    theta, shares = _types(theta, shares)
    weights = _weights(theta, shares)
    slopes, pooled = _pooled(shares, weights)
    if pooled and not iron:
        raise ValueError(f"the menu falls from type {pooled[0]} to the next: these types have to be pooled (iron)")
    positive(value_usd=value_usd, most=most)
    if budget_usd is not None:
        positive(budget_usd=budget_usd)
        value_usd = _scale_within(budget_usd, slopes, weights, most)
    work = np.minimum((value_usd * slopes) ** 2, most)
    return Menu(work, np.cumsum(np.diff(work, prepend=0.0) / theta))


def rents_usd(menu: Menu, theta) -> np.ndarray:
    """What each type keeps above its cost, [L]."""
    theta = vector("theta", theta)
    same_length(theta=theta, menu=menu.work)
    return menu.reward_usd - menu.work / theta


def server_utility_usd(menu: Menu, shares, *, value_usd: float = 1.0) -> float:
    """sum p_i (2 a sqrt(q_i) - R_i)."""
    return float(np.sum(vector("shares", shares) * (2 * value_usd * np.sqrt(menu.work) - menu.reward_usd)))


def choose(menu: Menu, cost_per_work_usd) -> np.ndarray:
    """The offer that each client takes: int [n], -1 where none is worth its cost. Of offers that are alike to it, a
    client takes the one of more work.

    cost_per_work_usd: [n], 1 / theta, inf for a client that cannot take part.
    """
    costs = np.asarray(cost_per_work_usd, np.float64)
    if costs.ndim != 1 or not np.all(costs >= 0):
        raise ValueError("cost_per_work_usd must be numbers of 0 or more, one for each client")
    known = np.where(np.isfinite(costs), costs, 0.0)
    gains = menu.reward_usd[None] - known[:, None] * menu.work[None]  # [n, L]
    alike = gains >= gains.max(axis=1, keepdims=True) - _TIE * menu.reward_usd[None]
    taken = menu.work.size - 1 - np.argmax(alike[:, ::-1], axis=1)
    gained = np.take_along_axis(gains, taken[:, None], axis=1)[:, 0]
    return np.where(np.isfinite(costs) & (gained >= -_TIE * menu.reward_usd[taken]), taken, -1)


def _types(theta, shares) -> tuple[np.ndarray, np.ndarray]:
    theta, shares = vector("theta", theta), vector("shares", shares)
    same_length(theta=theta, shares=shares)
    positive(theta=float(theta.min()), shares=float(shares.min()))
    if np.any(np.diff(theta) <= 0):
        raise ValueError("theta must rise from type to type")
    if abs(shares.sum() - 1) > 1e-6:
        raise ValueError(f"shares must add up to 1, got {shares.sum():g}")
    return theta, shares / shares.sum()


def _weights(theta: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """w [L]: what a unit of a type's work costs on average, with the rents of all higher types."""
    above = shares[::-1].cumsum()[::-1] - shares
    return shares / theta + above * (1 / theta - np.append(1 / theta[1:], 0.0))  # nobody is above the last


def _pooled(shares: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """(p / w [L] after adjacent types that fall are pooled, the types whose next one was lower)."""
    blocks: list[list[float]] = []  # [sum of p, sum of w, number of types]
    for p, w in zip(shares, weights):
        blocks.append([float(p), float(w), 1])
        while len(blocks) > 1 and blocks[-1][0] / blocks[-1][1] < blocks[-2][0] / blocks[-2][1]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last)]
    falls = np.flatnonzero(np.diff(shares / weights) < 0).tolist()
    return np.concatenate([np.full(int(count), p / w) for p, w, count in blocks]), falls


def _scale_within(budget: float, slopes: np.ndarray, weights: np.ndarray, most: float) -> float:
    """The largest value a whose menu costs no more than the budget on average."""
    from scipy import optimize  # slow to import, and only incentives need it

    def cost(value: float) -> float:
        return float(np.sum(weights * np.minimum((value * slopes) ** 2, most)))

    high = math.sqrt(budget / float(np.sum(weights * slopes**2)))  # without the limit
    if math.isinf(most):
        return high
    everything = math.sqrt(most) / float(slopes.min()) * (1 + 1e-12)
    if cost(everything) <= budget:
        return everything
    high = max(high, everything)
    return float(optimize.brentq(lambda value: cost(value) - budget, 0.0, high, xtol=1e-15 * high))  # pyright: ignore
