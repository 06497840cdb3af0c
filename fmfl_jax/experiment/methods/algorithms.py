"""Federated algorithms and personalizations by name.

Each says in its class variables what it goes together with; `config/federation.py` refuses the rest.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from fmfl_jax.fed.algorithms.apfl import apfl
from fmfl_jax.fed.algorithms.ditto import ditto
from fmfl_jax.fed.algorithms.fed_buff import fed_buff
from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from fmfl_jax.fed.algorithms.lora.flex_lora import flex_lora
from fmfl_jax.fed.algorithms.lora.flora import Target, flora
from fmfl_jax.fed.algorithms.lora.het_lora import het_lora
from fmfl_jax.fed.algorithms.partial import partial_model
from fmfl_jax.fed.algorithms.scaffold import scaffold
from fmfl_jax.fed.core.types import FederatedAlgorithm, GradFn, Optimizer, Params
from fmfl_jax.finite import finite_fields

_ALPHA_RATE = 0.1  # of APFL's learned alpha: this project's choice


LoraView = Literal["whole", "b_only", "with_base"] | None


class Parts(NamedTuple):
    """What algorithms are made of. trainable: the parameters as they start. layers: the names of the trained
    parameters, layer by layer in the model's order. targets, scale: of FLoRA, the adapted matrices and alpha / rank.
    ranks: of every client's LoRA, or None."""

    grad_fn: GradFn
    client_optimizer: Optimizer
    client_lr: float
    server_optimizer: Optimizer
    trainable: Params
    num_clients: int
    local_steps: int
    layers: tuple[tuple[str, ...], ...] = ()
    targets: tuple[Target, ...] = ()
    scale: float = 1.0
    ranks: tuple[int, ...] | None = None


class AlgorithmMethod(Protocol):
    """A configured algorithm. lora_view: how it sees a model with LoRA ("whole", "b_only" where A stays frozen,
    "with_base" where the adapted matrices are the server's too); None for any model.
    own_aggregation: it takes no aggregator. factored: clients send factors, of different ranks. uniform_weights:
    every client counts 1. sgd_only: plain SGD at the clients. asynchronous: no cohorts. personalizable: a
    personalization can take its place. proximal: FedProx's mu."""

    lora_view: ClassVar[LoraView]
    own_aggregation: ClassVar[bool]
    factored: ClassVar[bool]
    uniform_weights: ClassVar[bool]
    sgd_only: ClassVar[bool]
    asynchronous: ClassVar[bool]
    personalizable: ClassVar[bool]
    keeps_personal_model: ClassVar[bool]

    def make(self, parts: Parts) -> FederatedAlgorithm:
        """The algorithm."""
        ...


class _Traits:
    """The defaults of AlgorithmMethod."""

    lora_view: ClassVar[LoraView] = None
    own_aggregation: ClassVar[bool] = False
    factored: ClassVar[bool] = False
    uniform_weights: ClassVar[bool] = False
    sgd_only: ClassVar[bool] = False
    asynchronous: ClassVar[bool] = False
    personalizable: ClassVar[bool] = False
    keeps_personal_model: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class FedAvg(_Traits):
    """FedAvg, and with another server optimizer FedOpt."""

    personalizable: ClassVar[bool] = True

    def make(self, parts: Parts) -> FederatedAlgorithm:
        return fed_opt(parts.grad_fn, parts.client_optimizer, parts.server_optimizer)


@dataclasses.dataclass(frozen=True)
@finite_fields
class FedProx(_Traits):
    """FedAvg with mu / 2 ||w_c - w||^2 in the clients' objective."""

    proximal: float
    personalizable: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 < self.proximal < np.inf:
            raise ValueError(f"fedprox takes a proximal above 0, got {self.proximal}")

    def make(self, parts: Parts) -> FederatedAlgorithm:
        return fed_opt(parts.grad_fn, parts.client_optimizer, parts.server_optimizer, proximal=self.proximal)


@dataclasses.dataclass(frozen=True)
class Scaffold(_Traits):
    """SCAFFOLD."""

    own_aggregation: ClassVar[bool] = True
    uniform_weights: ClassVar[bool] = True
    sgd_only: ClassVar[bool] = True

    def make(self, parts: Parts) -> FederatedAlgorithm:
        return scaffold(parts.grad_fn, parts.client_lr, parts.server_optimizer, num_clients=parts.num_clients)


@dataclasses.dataclass(frozen=True)
class FedBuff(_Traits):
    """FedBuff. buffer_size: K; None is half of the cohort, which is its concurrency."""

    buffer_size: int | None = None
    own_aggregation: ClassVar[bool] = True
    uniform_weights: ClassVar[bool] = True
    asynchronous: ClassVar[bool] = True

    def __post_init__(self):
        if self.buffer_size is not None and self.buffer_size < 1:
            raise ValueError(f"buffer_size must be at least 1, got {self.buffer_size}")

    def make(self, parts: Parts) -> FederatedAlgorithm:
        return fed_buff(parts.grad_fn, parts.client_optimizer, parts.server_optimizer)


@dataclasses.dataclass(frozen=True)
class FedIt(FedAvg):
    """FedAvg of both LoRA factors (Zhang et al., ICASSP 2024)."""

    lora_view: ClassVar[LoraView] = "whole"


@dataclasses.dataclass(frozen=True)
class FfaLora(FedAvg):
    """FFA-LoRA: only B is trained."""

    lora_view: ClassVar[LoraView] = "b_only"


@dataclasses.dataclass(frozen=True)
class FedSaLora(_Traits):
    """FedSA-LoRA: every client keeps its B."""

    lora_view: ClassVar[LoraView] = "whole"
    keeps_personal_model: ClassVar[bool] = True

    def make(self, parts: Parts) -> FederatedAlgorithm:
        kept = {name: value for name, value in parts.trainable.items() if name.endswith("lora_b")}
        return partial_model(parts.grad_fn, parts.client_optimizer, parts.server_optimizer, kept=kept)


@dataclasses.dataclass(frozen=True)
class Flora(_Traits):
    """FLoRA."""

    lora_view: ClassVar[LoraView] = "with_base"
    own_aggregation: ClassVar[bool] = True
    factored: ClassVar[bool] = True

    def make(self, parts: Parts) -> FederatedAlgorithm:
        return flora(parts.grad_fn, parts.client_optimizer, parts.targets, scale=parts.scale, ranks=parts.ranks)


@dataclasses.dataclass(frozen=True)
class FlexLora(_Traits):
    """FlexLoRA."""

    lora_view: ClassVar[LoraView] = "whole"
    own_aggregation: ClassVar[bool] = True
    factored: ClassVar[bool] = True

    def make(self, parts: Parts) -> FederatedAlgorithm:
        return flex_lora(parts.grad_fn, parts.client_optimizer, ranks=parts.ranks)


@dataclasses.dataclass(frozen=True)
@finite_fields
class HetLora(_Traits):
    """HetLoRA. The defaults of gamma and regularization are this project's choice."""

    gamma: float = 0.99
    regularization: float = 5e-3
    lora_view: ClassVar[LoraView] = "whole"
    own_aggregation: ClassVar[bool] = True
    factored: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 < self.gamma <= 1 or not 0 <= self.regularization < np.inf:
            raise ValueError(
                f"hetlora needs a gamma in (0, 1] and a regularization of 0 or more, got {self.gamma} and "
                f"{self.regularization}"
            )

    def make(self, parts: Parts) -> FederatedAlgorithm:
        options = {"gamma": self.gamma, "regularization": self.regularization}
        return het_lora(parts.grad_fn, parts.client_optimizer, **options, ranks=parts.ranks)


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


ALGORITHMS: dict[str, Callable[..., AlgorithmMethod]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fedbuff": FedBuff,
    "fedit": FedIt,
    "ffa_lora": FfaLora,
    "fedsa_lora": FedSaLora,
    "flora": Flora,
    "flexlora": FlexLora,
    "hetlora": HetLora,
}
PERSONALIZATIONS: dict[str, Callable[..., PersonalizationMethod]] = {
    "ditto": Ditto,
    "apfl": Apfl,
    "fedper": FedPer,
    "fedrep": FedRep,
    "private_lora": PrivateLora,
}
