"""Codecs of updates by name: what a client sends in place of its update."""

import dataclasses
from typing import Literal, Protocol

from fmfl_jax.finite import finite_fields
from fmfl_jax.transport.codec import Codec
from fmfl_jax.transport.low_rank import low_rank
from fmfl_jax.transport.quantize import qsgd, stochastic_rounding
from fmfl_jax.transport.sparsify import top_k

Coding = Literal["fixed", "elias"]


class CodecMethod(Protocol):
    """A configured codec."""

    def make(self) -> Codec | None:
        """The codec; None sends updates as they are."""
        ...


@dataclasses.dataclass(frozen=True)
class Identity:
    """Updates as they are."""

    def make(self) -> Codec | None:
        return None


@dataclasses.dataclass(frozen=True)
class Qsgd:
    """QSGD (Alistarh et al., NeurIPS 2017); see transport/quantize.py for the fields."""

    levels: int
    bucket_size: int = 512
    coding: Coding = "fixed"
    error_feedback: bool = False

    def __post_init__(self):
        self.make()  # the codec checks its own numbers

    def make(self) -> Codec | None:
        options = {"bucket_size": self.bucket_size, "coding": self.coding, "error_feedback": self.error_feedback}
        return qsgd(self.levels, **options)


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Stochastic rounding to so many bits."""

    bits: int
    bucket_size: int = 512
    coding: Coding = "fixed"
    error_feedback: bool = True

    def __post_init__(self):
        self.make()

    def make(self) -> Codec | None:
        options = {"bucket_size": self.bucket_size, "coding": self.coding, "error_feedback": self.error_feedback}
        return stochastic_rounding(self.bits, **options)


@dataclasses.dataclass(frozen=True)
@finite_fields
class TopK:
    """The largest values."""

    fraction: float
    error_feedback: bool = True

    def __post_init__(self):
        self.make()

    def make(self) -> Codec | None:
        return top_k(self.fraction, error_feedback=self.error_feedback)


@dataclasses.dataclass(frozen=True)
class LowRank:
    """PowerSGD (Vogels et al., NeurIPS 2019)."""

    rank: int
    error_feedback: bool = True

    def __post_init__(self):
        self.make()

    def make(self) -> Codec | None:
        return low_rank(self.rank, error_feedback=self.error_feedback)


CODECS: dict[str, type] = {
    "identity": Identity,
    "qsgd": Qsgd,
    "rounding": Rounding,
    "topk": TopK,
    "lowrank": LowRank,
}
