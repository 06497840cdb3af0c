"""Personalizations by name: what takes the place of an algorithm's client so that each keeps a model of its own."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal, Protocol

import numpy as np

from fmfl_jax.experiment.methods.algorithms import Parts
from fmfl_jax.fed.algorithms.apfl import apfl
from fmfl_jax.fed.algorithms.ditto import ditto
from fmfl_jax.fed.algorithms.partial import partial_model
from fmfl_jax.fed.core.types import FederatedAlgorithm, Params
from fmfl_jax.finite import finite_fields

_ALPHA_RATE = 0.1  # of APFL's learned alpha: this project's choice


class PersonalizationMethod(Protocol):
    """A configured personalization. proximal: whether FedProx's term can stand beside it. private_rank: ranks of a LoRA
    that stay at the clients, 0 for none."""

    proximal: ClassVar[bool]

    @property
    def private_rank(self) -> int: ...

    def make(self, parts: Parts, proximal: float) -> FederatedAlgorithm:
        """The algorithm; proximal: FedProx's mu, 0 for none."""
        ...


class _Personalization:
    proximal: ClassVar[bool] = False

    @property
    def private_rank(self) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
@finite_fields
class Ditto(_Personalization):
    """Ditto. strength: lambda."""

    strength: float
    proximal: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 <= self.strength < np.inf:
            raise ValueError(f"ditto's strength must be 0 or more, got {self.strength}")

    def make(self, parts: Parts, proximal: float) -> FederatedAlgorithm:
        options = {"strength": self.strength, "proximal": proximal}
        return ditto(parts.grad_fn, parts.client_optimizer, parts.server_optimizer, **options)


@dataclasses.dataclass(frozen=True)
@finite_fields
class Apfl(_Personalization):
    """APFL. alpha: a number, or "learned" from 0.5 on."""

    alpha: float | Literal["learned"]
    proximal: ClassVar[bool] = True

    def __post_init__(self):
        if self.alpha != "learned" and not 0 <= self.alpha <= 1:
            raise ValueError(f"apfl's alpha must be in [0, 1] or learned, got {self.alpha}")

    def make(self, parts: Parts, proximal: float) -> FederatedAlgorithm:
        return apfl(
            parts.grad_fn,
            parts.client_optimizer,
            parts.server_optimizer,
            alpha=0.5 if self.alpha == "learned" else self.alpha,
            alpha_learning_rate=_ALPHA_RATE if self.alpha == "learned" else None,
            proximal=proximal,
        )


@dataclasses.dataclass(frozen=True)
class FedPer(_Personalization):
    """FedPer. layers: how many of the last layers stay at the clients."""

    layers: int

    def __post_init__(self):
        _check_layers(self.layers)

    def make(self, parts: Parts, proximal: float) -> FederatedAlgorithm:
        kept = last_layers(parts, self.layers)
        return partial_model(parts.grad_fn, parts.client_optimizer, parts.server_optimizer, kept=kept)


@dataclasses.dataclass(frozen=True)
class FedRep(_Personalization):
    """FedRep. layers: as FedPer's. steps: on these, before the others; None is half of the round's."""

    layers: int
    steps: int | None = None

    def __post_init__(self):
        _check_layers(self.layers)
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"fedrep's steps must be at least 1, got {self.steps}")

    def make(self, parts: Parts, proximal: float) -> FederatedAlgorithm:
        kept, steps = last_layers(parts, self.layers), self.steps or max(1, parts.local_steps // 2)
        return partial_model(parts.grad_fn, parts.client_optimizer, parts.server_optimizer, kept=kept, kept_steps=steps)


@dataclasses.dataclass(frozen=True)
class PrivateLora(_Personalization):
    """The last ranks of a LoRA stay at the clients. rank: how many."""

    rank: int

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"the clients must keep at least 1 rank, got {self.rank}")

    @property
    def private_rank(self) -> int:
        return self.rank

    def make(self, parts: Parts, proximal: float) -> FederatedAlgorithm:
        kept = {name: value for name, value in parts.trainable.items() if name.endswith(".private")}
        return partial_model(parts.grad_fn, parts.client_optimizer, parts.server_optimizer, kept=kept)


def last_layers(parts: Parts, count: int) -> Params:
    """What is trained in the last `count` layers. Raises ValueError where that is nothing or all."""
    names = [name for layer in parts.layers[max(len(parts.layers) - count, 0) :] for name in layer]
    kept = {name: parts.trainable[name] for name in names if name in parts.trainable}
    if not kept or len(kept) == len(parts.trainable):
        raise ValueError(
            f"{count} layers keep {len(kept)} of {len(parts.trainable)} trained arrays at the clients: expected some, "
            "and not all, in whole layers"
        )
    return kept


def _check_layers(count: int) -> None:
    if count < 1:
        raise ValueError(f"the clients must keep at least 1 layer, got {count}")


PERSONALIZATIONS: dict[str, Callable[..., PersonalizationMethod]] = {
    "ditto": Ditto,
    "apfl": Apfl,
    "fedper": FedPer,
    "fedrep": FedRep,
    "private_lora": PrivateLora,
}
