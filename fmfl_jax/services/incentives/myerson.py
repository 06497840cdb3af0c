"""Myerson's optimal auction of one good: virtual values and the reserve price (Mathematics of OR 1981).

    phi(v) = v - (1 - F(v)) / f(v)

The good goes to the highest virtual value that is not below what the seller keeps it for; the winner pays the lowest
value with which it would still have won. With equal bidders that is the second price with the reserve phi^-1(0).

Values are drawn from a continuous distribution of scipy.stats (cdf, pdf, ppf, support).

    >>> uniform = scipy.stats.uniform()
    >>> reserve_price(uniform), expected_revenue(uniform, 3, 0.5)      # 1/2, 17/32
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import integrate, optimize

from fmfl_jax.services.checks import at_least, same_length, vector

_TAIL = 1e-9  # of a distribution without ends, beyond which nobody's value is looked for
_GRID = 1025  # quantiles on which virtual values are held to rise


class Award(NamedTuple):
    """winner: the bidder's place, None where the seller keeps the good. price_usd: what it pays."""

    winner: int | None
    price_usd: float


def virtual_value(distribution: Any, value):
    """phi(value); broadcasts. Above the support it is the value itself, below it -inf."""
    value = np.asarray(value, np.float64)
    above, density = 1 - distribution.cdf(value), distribution.pdf(value)
    outside = np.where(above > 0, -np.inf, value)
    return np.where(density > 0, value - above / np.where(density > 0, density, 1), outside)


def reserve_price(distribution: Any, *, kept_usd: float = 0.0) -> float:
    """The lowest price to sell at: phi of it is kept_usd, what the good is worth to the seller.

    Raises ValueError for a distribution whose virtual values do not rise (it would have to be ironed) and where nobody
    would ever pay.
    """
    check_regular(distribution)
    return _inverse(distribution, kept_usd)


def check_regular(distribution: Any) -> None:
    """Raises ValueError unless the virtual values rise over the support."""
    phi = virtual_value(distribution, distribution.ppf(np.linspace(1e-6, 1 - 1e-6, _GRID)))
    falls = np.diff(phi) < -1e-9 * np.maximum(np.abs(phi[:-1]), 1e-12)
    if falls.any() or not np.isfinite(phi).all():
        raise ValueError("the virtual values of this distribution do not rise: one reserve price is not optimal for it")


def optimal_auction(bids_usd, distributions: Sequence[Any], *, kept_usd: float = 0.0) -> Award:
    """Myerson's auction of bidders that need not be alike. Equal virtual values go by the bidders' order.

    bids_usd: [n]. distributions: n of scipy.stats, each bidder's. Raises ValueError as `reserve_price` does.
    """
    bids = vector("bids_usd", bids_usd)
    same_length(bids_usd=bids, distributions=distributions)
    for distribution in {id(d): d for d in distributions}.values():
        check_regular(distribution)
    phi = np.asarray([float(virtual_value(d, bid)) for d, bid in zip(distributions, bids)])
    winner = int(np.argmax(phi))
    if phi[winner] < kept_usd:
        return Award(None, 0.0)
    others = np.delete(phi, winner)
    return Award(winner, _inverse(distributions[winner], max(float(others.max(initial=kept_usd)), kept_usd)))


def second_price_auction(bids_usd, *, reserve_usd: float = 0.0) -> Award:
    """The highest bid that is not below the reserve, for the larger of the second bid and the reserve."""
    bids = vector("bids_usd", bids_usd)
    at_least(1, number_of_bids=len(bids))
    winner = int(np.argmax(bids))
    if bids[winner] < reserve_usd:
        return Award(None, 0.0)
    return Award(winner, max(float(np.delete(bids, winner).max(initial=reserve_usd)), reserve_usd))


def expected_revenue(distribution: Any, num_bidders: int, reserve_usd: float) -> float:
    """Of the second-price auction with this reserve: E phi(highest value) where it reaches the reserve."""
    at_least(1, num_bidders=num_bidders)
    low, high = _ends(distribution)

    def density(value: float) -> float:
        highest = num_bidders * distribution.cdf(value) ** (num_bidders - 1) * distribution.pdf(value)
        return float(virtual_value(distribution, value)) * highest if highest > 0 else 0.0

    return float(integrate.quad(density, max(reserve_usd, low), high, limit=200)[0])


def _inverse(distribution: Any, virtual_usd: float) -> float:
    low, high = _ends(distribution)
    inside = 1e-12 * (high - low)
    low, high = low + inside, high - inside
    if float(virtual_value(distribution, low)) >= virtual_usd:
        return float(low - inside)
    if float(virtual_value(distribution, high)) < virtual_usd:
        raise ValueError(f"nobody's virtual value reaches {virtual_usd:g}: the good is never sold")
    gap = lambda value: float(virtual_value(distribution, value)) - virtual_usd
    return float(optimize.brentq(gap, low, high, xtol=1e-13 * max(1.0, abs(high))))  # pyright: ignore


def _ends(distribution: Any) -> tuple[float, float]:
    low, high = (float(end) for end in distribution.support())
    low = low if np.isfinite(low) else float(distribution.ppf(_TAIL))
    return low, high if np.isfinite(high) else float(distribution.ppf(1 - _TAIL))
