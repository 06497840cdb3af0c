"""What the modules of peft/ put into a Llama: its slots, as functions that the model calls without knowing peft/."""

from typing import Any, Protocol

import jax


class LoraSlot(Protocol):
    """What is added to a Linear's product."""

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None, /) -> jax.Array:
        """x [..., D] -> [..., sum of the output dims] in x's dtype."""
        ...

    def prepared(self, dtype, /) -> Any:
        """The same for decoding in this dtype, which takes its place."""
        ...


class AdapterSlot(Protocol):
    """What follows a sublayer."""

    def __call__(self, x: jax.Array, /) -> jax.Array:
        """x [..., D] -> [..., D]."""
        ...

    def prepared(self, dtype, /) -> Any:
        """The same for decoding in this dtype, which takes its place."""
        ...


class PrefixSlot(Protocol):
    """Keys and values that every query of a layer also sees (prefix tuning)."""

    num_tokens: int

    def __call__(self, dtype, /) -> tuple[jax.Array, jax.Array]:
        """keys and values, [P, K, H] each."""
        ...


class PromptSlot(Protocol):
    """What stands before the embedded tokens."""

    num_tokens: int

    def __call__(self, dtype, /) -> jax.Array:
        """[P, D]."""
        ...
