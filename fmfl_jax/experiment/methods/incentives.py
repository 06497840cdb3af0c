"""Incentives by name: how the server takes on clients for their joules' worth, and what it pays them."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from fmfl_jax.finite import finite_fields
from fmfl_jax.services.incentives import recruit
from fmfl_jax.services.incentives.recruit import Offers

MakeOffers = Callable[[np.ndarray], Offers]
"""costs_usd float64 [num_clients], inf for who cannot take part -> Offers."""


class MarketInputs(NamedTuple):
    """cohort_size: the most clients of a round. values: float [num_clients], what each client's work is worth."""

    cohort_size: int
    values: np.ndarray


class IncentiveMethod(Protocol):
    """A configured incentive."""

    def make(self, inputs: MarketInputs) -> MakeOffers:
        """The mechanism."""
        ...


@dataclasses.dataclass(frozen=True)
@finite_fields
class Auction:
    """The proportional-share auction; clients are worth their weight in the mean. budget_usd: of a round, never
    exceeded."""

    budget_usd: float

    def __post_init__(self):
        _above_zero(budget_usd=self.budget_usd)

    def make(self, inputs: MarketInputs) -> MakeOffers:
        return lambda costs: recruit.auction_offers(
            costs, inputs.values, budget_usd=self.budget_usd, most=inputs.cohort_size
        )


@dataclasses.dataclass(frozen=True)
@finite_fields
class Contract:
    """A menu of shares of the rounds and rewards, by types of cost. budget_usd: of a round, on average; None: what
    serves the server best that values a client in every round at 2 `value` mean costs. types: offers on the menu."""

    budget_usd: float | None = None
    value: float | None = None
    types: int = 5

    def __post_init__(self):
        _budget_or_value(self.budget_usd, self.value)
        if self.types < 1:
            raise ValueError(f"types must be at least 1, got {self.types}")

    def make(self, inputs: MarketInputs) -> MakeOffers:
        options = {} if self.value is None else {"value": self.value}
        return lambda costs: recruit.contract_offers(
            costs, budget_usd=self.budget_usd, num_types=self.types, most=inputs.cohort_size, **options
        )


@dataclasses.dataclass(frozen=True)
@finite_fields
class Stackelberg:
    """A reward shared by the clients' efforts, their shares of the rounds. budget_usd: the reward of a round, on
    average; None: what serves the server best that values efforts t at `value` ln(1 + sum ln(1 + t)) mean costs."""

    budget_usd: float | None = None
    value: float | None = None

    def __post_init__(self):
        _budget_or_value(self.budget_usd, self.value)

    def make(self, inputs: MarketInputs) -> MakeOffers:
        options = {} if self.value is None else {"value": self.value}
        return lambda costs: recruit.stackelberg_offers(
            costs, budget_usd=self.budget_usd, most=inputs.cohort_size, **options
        )


@dataclasses.dataclass(frozen=True)
@finite_fields
class Posted:
    """One price for whoever accepts it, drawn at random: random selection at the same budget. budget_usd: of a round,
    never exceeded."""

    budget_usd: float

    def __post_init__(self):
        _above_zero(budget_usd=self.budget_usd)

    def make(self, inputs: MarketInputs) -> MakeOffers:
        return lambda costs: recruit.posted_offers(costs, budget_usd=self.budget_usd, most=inputs.cohort_size)


def _budget_or_value(budget_usd: float | None, value: float | None) -> None:
    if budget_usd is not None and value is not None:
        raise ValueError("give a budget_usd or a value: a budget is spent whatever the work is worth")
    _above_zero(**{name: x for name, x in (("budget_usd", budget_usd), ("value", value)) if x is not None})


def _above_zero(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")


INCENTIVES: dict[str, type] = {
    "auction": Auction,
    "contract": Contract,
    "stackelberg": Stackelberg,
    "posted": Posted,
}
