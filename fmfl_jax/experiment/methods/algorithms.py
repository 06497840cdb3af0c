"""Federated algorithms by name.

Each says in its class variables what it goes together with; `config/federation.py` refuses the rest.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from fmfl_jax.fed.algorithms.fed_buff import fed_buff
from fmfl_jax.fed.algorithms.fed_opt import Penalty, fed_opt
from fmfl_jax.fed.algorithms.lora.flex_lora import flex_lora
from fmfl_jax.fed.algorithms.lora.flora import Target, flora
from fmfl_jax.fed.algorithms.lora.het_lora import het_lora
from fmfl_jax.fed.algorithms.partial import partial_model
from fmfl_jax.fed.algorithms.scaffold import scaffold
from fmfl_jax.fed.core.types import FederatedAlgorithm, GradFn, Optimizer, Params
from fmfl_jax.finite import finite_fields

LoraView = Literal["whole", "b_only", "with_base"] | None


class Parts(NamedTuple):
    """What algorithms are made of. trainable: the parameters as they start. layers: the names of the trained
    parameters, layer by layer in the model's order. targets, scale: of FLoRA, the adapted matrices and alpha / rank.
    ranks: of every client's LoRA, or None. penalty: of local training, for FedAvg alone."""

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
    penalty: Penalty | None = None


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
        return fed_opt(parts.grad_fn, parts.client_optimizer, parts.server_optimizer, penalty=parts.penalty)


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
