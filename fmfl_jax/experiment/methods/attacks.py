"""Attacks by name: what malicious clients do to their update, or to their data."""

import dataclasses
from typing import Protocol

from fmfl_jax.fed import attacks
from fmfl_jax.fed.core.round import Attack
from fmfl_jax.finite import finite_fields


class AttackMethod(Protocol):
    """A configured attack."""

    def make(self) -> Attack | None:
        """What it does to updates; None where it changes the data alone."""
        ...


@dataclasses.dataclass(frozen=True)
class NoAttack:
    """Everybody is honest."""

    def make(self) -> Attack | None:
        return None


@dataclasses.dataclass(frozen=True)
@finite_fields
class SignFlip:
    """-factor times the honest update."""

    factor: float = 1.0

    def make(self) -> Attack | None:
        return attacks.sign_flip(self.factor)


@dataclasses.dataclass(frozen=True)
@finite_fields
class Scaling:
    """factor times the honest update: model replacement (Bagdasaryan et al., AISTATS 2020)."""

    factor: float = 10.0

    def make(self) -> Attack | None:
        return attacks.scaling(self.factor)


@dataclasses.dataclass(frozen=True)
@finite_fields
class Alie:
    """A Little Is Enough (Baruch et al., NeurIPS 2019). z: None is the published choice."""

    z: float | None = None

    def make(self) -> Attack | None:
        return attacks.alie(self.z)


@dataclasses.dataclass(frozen=True)
@finite_fields
class InnerProduct:
    """-epsilon times the benign mean (Xie et al., UAI 2020)."""

    epsilon: float = 0.5

    def make(self) -> Attack | None:
        return attacks.inner_product(self.epsilon)


@dataclasses.dataclass(frozen=True)
@finite_fields
class Gaussian:
    """Noise in place of the update (Blanchard et al., NeurIPS 2017)."""

    std: float

    def make(self) -> Attack | None:
        return attacks.gaussian(self.std)


@dataclasses.dataclass(frozen=True)
class LabelFlip:
    """Wrong labels; for language models a cipher over the vocabulary."""

    def make(self) -> Attack | None:
        return None


ATTACKS: dict[str, type] = {
    "none": NoAttack,
    "sign_flip": SignFlip,
    "scale": Scaling,
    "alie": Alie,
    "ipm": InnerProduct,
    "noise": Gaussian,
    "label_flip": LabelFlip,
}
