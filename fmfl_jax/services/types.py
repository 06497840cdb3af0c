"""What goes to a foundation model and comes back: records with their payload bits and cost. Services see functions.

    request = ScoreRequest(texts=("Rain all day.",), words=(" weather", " sports"))
    request.payload_bits                                     # 8 bits a byte of UTF-8: 8 * (13 + 8 + 7)

Whoever holds a model makes the functions (models/scoring.py, models/batch_generate.py); an API may serve them as well,
or only some: `needs_logits` says in one line what is missing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fmfl_jax.finite import finite_fields

ID_BITS = 32  # a public text that both sides hold is named by its number


class ScoreFn(Protocol):
    def __call__(self, texts: Sequence[str], words: Sequence[str], /) -> np.ndarray:
        """float [N, K]: log p(word k | text n), in nats."""
        ...


class GenerateFn(Protocol):
    def __call__(self, prompts: Sequence[str], seed: int, /) -> list[str]:
        """The text that follows each prompt. The same prompts and seed give the same text."""
        ...


class LogitsFn(Protocol):
    def __call__(self, texts: Sequence[str], /) -> np.ndarray:
        """float [N, V]: log-probabilities of the token after each text, in nats."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class Cost:
    """What an answer took: seconds, joules, and price in the unit of the placement's price list."""

    seconds: float = 0.0
    joules: float = 0.0
    price: float = 0.0

    def __post_init__(self):
        if min(self.seconds, self.joules, self.price) < 0:
            raise ValueError(f"a cost is 0 or more, got {self}")

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            seconds=self.seconds + other.seconds, joules=self.joules + other.joules, price=self.price + other.price
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """texts to score by label words. ids: their numbers in a public set that the server holds too; then the numbers
    travel, and no text."""

    texts: tuple[str, ...]
    words: tuple[str, ...]
    ids: tuple[int, ...] | None = None

    def __post_init__(self):
        if not self.words:
            raise ValueError("a score request without label words")
        if self.ids is not None and len(self.ids) != len(self.texts):
            raise ValueError(f"{len(self.ids)} ids for {len(self.texts)} texts")

    @property
    def payload_bits(self) -> int:
        """Bits up."""
        return _text_bits(self.words) + (_text_bits(self.texts) if self.ids is None else ID_BITS * len(self.ids))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreResponse:
    """log_probs float [N, K]; bits_per_value: as they are sent; tokens_in: that the model read."""

    log_probs: np.ndarray
    bits_per_value: int = 32
    tokens_in: int = 0
    cost: Cost = Cost()

    @property
    def payload_bits(self) -> int:
        """Bits down."""
        return self.log_probs.size * self.bits_per_value


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """prompts to go on from, by at most max_new_tokens tokens each."""

    prompts: tuple[str, ...]
    max_new_tokens: int
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: expected at least 1")

    @property
    def payload_bits(self) -> int:
        """Bits up."""
        return _text_bits(self.prompts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateResponse:
    """texts: what follows each prompt; tokens_in and tokens_out: read and drawn."""

    texts: tuple[str, ...]
    tokens_in: int = 0
    tokens_out: int = 0
    cost: Cost = Cost()

    @property
    def payload_bits(self) -> int:
        """Bits down."""
        return _text_bits(self.texts)


def needs_logits(logits: LogitsFn | None, service: str) -> LogitsFn:
    """The function, or ValueError where the foundation model is an API that gives text alone."""
    if logits is None:
        raise ValueError(f"{service} needs the foundation model's logits, and this one gives only text")
    return logits


def _text_bits(texts: Sequence[str]) -> int:
    return 8 * sum(len(text.encode("utf-8")) for text in texts)
