"""Client selection by name: who takes part in a round."""

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np

from fmfl_jax.fed import selection
from fmfl_jax.fed.selection import Selector
from fmfl_jax.finite import finite_fields


class SelectionInputs(NamedTuple):
    """cohort_size: clients per round. sizes: int [num_clients], examples of each. deadline_s: a network's."""

    cohort_size: int
    sizes: np.ndarray
    deadline_s: float | None


class SelectionMethod(Protocol):
    """A configured selection."""

    def make(self, inputs: SelectionInputs) -> Selector:
        """The selector."""
        ...


@dataclasses.dataclass(frozen=True)
class Uniform:
    """cohort_size clients without replacement."""

    def make(self, inputs: SelectionInputs) -> Selector:
        return selection.uniform(inputs.cohort_size)


@dataclasses.dataclass(frozen=True)
class Poisson:
    """Each client by an independent coin: what the accounting of privacy assumes."""

    def make(self, inputs: SelectionInputs) -> Selector:
        return selection.poisson(inputs.cohort_size / len(inputs.sizes))


@dataclasses.dataclass(frozen=True)
@finite_fields
class Oort:
    """By utility and speed (Lai et al., OSDI 2021). alpha: the exponent of the penalty for slow clients."""

    alpha: float = 2.0

    def __post_init__(self):
        if not 0 <= self.alpha < np.inf:
            raise ValueError(f"oort's alpha must be 0 or more, got {self.alpha}")

    def make(self, inputs: SelectionInputs) -> Selector:
        return selection.oort(inputs.cohort_size, inputs.sizes, alpha=self.alpha)


@dataclasses.dataclass(frozen=True)
class Deadline:
    """Among those that are predicted to be done in time. It needs a network with a deadline."""

    def make(self, inputs: SelectionInputs) -> Selector:
        if inputs.deadline_s is None:
            raise ValueError("selection by deadline needs a network with a deadline")
        return selection.deadline_aware(inputs.cohort_size, inputs.deadline_s)


SELECTIONS: dict[str, type] = {"uniform": Uniform, "poisson": Poisson, "oort": Oort, "deadline": Deadline}
