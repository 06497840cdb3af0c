"""What is sent in place of an update: the interface of codecs, and the identity.

A `Codec` is pure functions, in the manner of optax's transformations, vmappable over clients. The decoded update is
what the server reconstructs from exactly payload_bits bits; the state (error feedback, warm starts) stays at the
client. If the network loses the update, `keep_lost` puts it back into the client's residual.

Error feedback: Karimireddy et al., ICML 2019.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fmfl_jax.transport.size import tree_bits

Tree = Any


class CodecState(NamedTuple):
    """residual: what error feedback still owes, a tree like the update (or ()); entropy_bits: the size of the last
    message under an ideal memoryless entropy code (the payload itself where nothing is coded); extra: of the method."""

    residual: Tree
    entropy_bits: jax.Array
    extra: Tree = ()


class Codec(NamedTuple):
    """init(template) -> state. apply(update, state, key) -> (decoded, state, payload_bits float32 scalar).
    exact_bits(template) -> Python int, or None where the size depends on the values. float32 is exact up to 2^24 bits
    and within 6e-8 above: the integer is for whoever counts bytes."""

    init: Callable[[Tree], CodecState]
    apply: Callable[[Tree, CodecState, jax.Array], tuple[Tree, CodecState, jax.Array]]
    exact_bits: Callable[[Tree], int | None]


def identity() -> Codec:
    """The update as it is, bit for bit; its dtypes' widths in bits."""

    def apply(update, state, key):
        del key
        bits = jnp.float32(tree_bits(update))
        return update, state._replace(entropy_bits=bits), bits

    return Codec(lambda template: start(template, False), apply, tree_bits)


def start(template: Tree, error_feedback: bool, extra: Tree = ()) -> CodecState:
    """The state before the first update."""
    residual = optax.tree.zeros_like(template) if error_feedback else ()
    return CodecState(residual, jnp.zeros((), jnp.float32), extra)


def owed(update: Tree, state: CodecState, error_feedback: bool) -> Tree:
    """The update plus what earlier rounds left out."""
    return jax.tree.map(jnp.add, update, state.residual) if error_feedback else update


def left_out(owing: Tree, decoded: Tree, error_feedback: bool) -> Tree:
    """The residual after `decoded` was sent."""
    return optax.tree.sub(owing, decoded) if error_feedback else ()


def keep_lost(state: CodecState, decoded: Tree, delivered) -> CodecState:
    """The client's state after it learns whether its update arrived: a lost one returns to the residual whole.

    Without error feedback there is nothing to keep. delivered: bool scalar (or [C] under vmap).
    """
    if not jax.tree.leaves(state.residual):
        return state
    residual = jax.tree.map(lambda r, d: jnp.where(delivered, r, r + d), state.residual, decoded)
    return state._replace(residual=residual)
