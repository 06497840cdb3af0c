"""What is sent in place of an update: the interface of codecs, and the identity.

A `Codec` is pure functions, in the manner of optax's transformations. For the simulator, `apply`, vmappable over
clients: what the server reconstructs from exactly payload_bits bits; the state (error feedback, warm starts) stays at
the client. If the network loses the update, `keep_lost` puts it back into the client's residual. For real machines, the
two halves of it: `encode` at the client, `decode` at the server.

    >>> codec = qsgd(16, coding="elias")
    >>> state = codec.init(update)
    >>> message, state = codec.encode(update, state, key)    # the state and the key that apply would take
    >>> received = codec.decode(message, update)             # or any tree of the same shapes and dtypes

`received` is what codec.apply(update, state, key) returns, bit for bit, and the message is HEADER_BYTES longer than the
payload's bits, rounded up to bytes (transport/message.py).

Error feedback: Karimireddy et al., ICML 2019.
"""

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmfl_jax.transport import message
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
    and within 6e-8 above: the integer is for whoever counts bytes.
    encode(update, state, key) -> (bytes, state), of one client, not traceable. decode(bytes, template) -> the decoded
    update; ValueError for a message that is truncated, too long, damaged, or of another codec or template."""

    init: Callable[[Tree], CodecState]
    apply: Callable[[Tree, CodecState, jax.Array], tuple[Tree, CodecState, jax.Array]]
    exact_bits: Callable[[Tree], int | None]
    encode: Callable[[Tree, CodecState, jax.Array], tuple[bytes, CodecState]]
    decode: Callable[[bytes, Tree], Tree]


class Coded(NamedTuple):
    """What a codec makes of an update: symbols, all that the decoded update is made of; the decoded update, the state
    after it, the payload's bits."""

    symbols: Tree
    decoded: Tree
    state: CodecState
    bits: jax.Array


def make_codec(
    name: str,
    *,
    init: Callable[[Tree], CodecState],
    code: Callable[[Tree, CodecState, jax.Array], Coded],
    exact_bits: Callable[[Tree], int | None],
    to_bytes: Callable[[Tree, Tree], bytes],
    from_bytes: Callable[[memoryview, Tree], Tree],
    most_bytes: Callable[[Tree], int] = lambda template: 0,
) -> Codec:
    """The codec of a function that is traced, and of symbols' bytes.

    name: method and numbers; a message of another name is refused. to_bytes(symbols, template) -> payload, with numpy
    arrays in place of JAX's. from_bytes(payload, template) -> decoded update; raises ValueError. most_bytes(template):
    of the payload, where exact_bits gives None.
    """
    compiled = jax.jit(code)

    def apply(update, state, key):
        coded = code(update, state, key)
        return coded.decoded, coded.state, coded.bits

    def encode(update, state, key):
        coded = compiled(update, state, key)
        payload = to_bytes(jax.device_get(coded.symbols), update)
        return message.frame(payload, message.address_of(name, update)), coded.state

    def decode(data, template):
        bits = exact_bits(template)
        most = most_bytes(template) if bits is None else -(-bits // 8)
        payload = message.unframe(data, message.address_of(name, template), most)
        if bits is not None and len(payload) != most:
            raise ValueError(f"message has {len(payload)} bytes of payload, expected {most}")
        return from_bytes(payload, template)

    return Codec(init, apply, exact_bits, encode, decode)


def identity() -> Codec:
    """The update as it is, bit for bit; its dtypes' widths in bits."""

    def code(update, state, key):
        del key
        bits = jnp.float32(tree_bits(update))
        return Coded(update, update, state._replace(entropy_bits=bits), bits)

    return make_codec(
        "identity",
        init=lambda template: start(template, False),
        code=code,
        exact_bits=tree_bits,
        to_bytes=lambda symbols, template: b"".join(raw_bytes(leaf) for leaf in jax.tree.leaves(symbols)),
        from_bytes=from_raw_bytes,
    )


def raw_bytes(leaf: np.ndarray) -> bytes:
    """The values in C order, each little-endian."""
    if sys.byteorder == "big":
        leaf = leaf.byteswap()
    return leaf.tobytes()


def from_raw_bytes(payload, template: Tree) -> Tree:
    """A tree of numpy arrays like `template` from its leaves' `raw_bytes`, one after another, all of the payload; views
    of it where the byte order allows."""
    leaves, structure = jax.tree.flatten(template)
    found, at = [], 0
    for leaf in leaves:
        dtype = np.dtype(leaf.dtype)
        size = math.prod(leaf.shape) * dtype.itemsize
        array = np.frombuffer(payload[at : at + size], dtype).reshape(leaf.shape)
        found.append(array.byteswap() if sys.byteorder == "big" else array)
        at += size
    return jax.tree.unflatten(structure, found)


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
