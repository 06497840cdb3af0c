"""Measures of the clients' contributions by name."""

import dataclasses
from typing import Protocol

from fmfl_jax.finite import finite_fields


class ContributionMethod(Protocol):
    """A configured measure, one of the classes below."""


@dataclasses.dataclass(frozen=True)
@finite_fields
class Gtg:
    """GTG-Shapley of every round. tolerance: nats a token by which a round, and the rest of a permutation, must change
    the model's loss to be looked into. convergence: relative change of the estimate at which sampling ends."""

    tolerance: float = 0.0
    convergence: float = 0.05

    def __post_init__(self):
        if self.tolerance < 0 or self.convergence < 0:
            raise ValueError("tolerance and convergence must be 0 or more")


@dataclasses.dataclass(frozen=True)
class LeaveOneOut:
    """What the round loses without the client's update."""


@dataclasses.dataclass(frozen=True)
class ComFedSV:
    """Shapley values of the whole run by completing what partial participation leaves unknown. permutations: drawn
    once. rank: of the completed matrix. All clients take part in the first round."""

    permutations: int = 20
    rank: int = 3

    def __post_init__(self):
        if self.permutations < 1 or self.rank < 1:
            raise ValueError(f"permutations and rank must be at least 1, got {self.permutations} and {self.rank}")


CONTRIBUTIONS: dict[str, type] = {"gtg": Gtg, "leave_one_out": LeaveOneOut, "comfedsv": ComFedSV}
