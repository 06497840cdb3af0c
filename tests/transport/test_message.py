"""Updates as bytes: what arrives is what the round applies, bit for bit; the length is the bits counted; no damage
passes."""

import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.transport.codec import identity
from fmfl_jax.transport.low_rank import low_rank
from fmfl_jax.transport.message import HEADER_BYTES, frame, unframe
from fmfl_jax.transport.quantize import qsgd, stochastic_rounding
from fmfl_jax.transport.sparsify import top_k

CODECS = {
    "identity": identity(),
    "qsgd": qsgd(16, bucket_size=64, coding="elias"),
    "rounding": stochastic_rounding(4, bucket_size=64),
    "topk": top_k(0.07),
    "lowrank": low_rank(2),
}
# Of several buckets, a matrix with and without factors, nothing, a scalar, and narrow types; and values at the edges.
SHAPES = {
    "a": ((12, 3, 9), jnp.float32),
    "b": ((7,), jnp.bfloat16),
    "d": ((0, 3), jnp.float32),
    "e": ((), jnp.float16),
}
EDGES = [0.0, -0.0, 1e-40, 1e-38, -3e30]


def update_of(seed):
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.normal(size=shape) * 10.0 ** rng.integers(-4, 3, size=shape)
    tree = {name: jnp.asarray(draw(shape), dtype) for name, (shape, dtype) in SHAPES.items()}
    return tree | {"a": tree["a"].at[:5, 0, 0].set(jnp.asarray(EDGES))}


def bits_equal(a, b):
    def same(x, y):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert x.tobytes() == y.tobytes()

    jax.tree.map(same, a, b)


@pytest.mark.parametrize("name", CODECS)
def test_what_arrives_is_what_the_simulator_applies(name):
    codec = CODECS[name]
    apply = jax.jit(codec.apply)
    update = update_of(0)
    state = mine = codec.init(update)
    template = jax.eval_shape(lambda: update)
    for step in range(3):  # error feedback and warm starts go on from round to round
        update, key = update_of(step), jax.random.key(100 + step)
        decoded, state, bits = apply(update, state, key)
        message, mine = codec.encode(update, mine, key)
        bits_equal(codec.decode(message, template), decoded)
        bits_equal(mine, state)
        assert len(message) == HEADER_BYTES + -(-int(bits) // 8)
    # The server's finite check drops what is not finite: it must arrive as such.
    update["a"] = update["a"].at[0, 0, 0].set(jnp.nan)
    message, _ = codec.encode(update, codec.init(update), key)
    assert np.any(np.isnan(codec.decode(message, template)["a"]))


@pytest.mark.parametrize("name", CODECS)
def test_damage_is_refused(name):
    codec = CODECS[name]
    tree = {"w": jnp.linspace(-1.0, 2.0, 60).reshape(6, 10)}
    message, _ = codec.encode(tree, codec.init(tree), jax.random.key(0))
    for size in range(len(message)):
        with pytest.raises(ValueError):
            codec.decode(message[:size], tree)
    for tail in (b"\0", b"x" * 1000):
        with pytest.raises(ValueError, match="expected at most|announces"):
            codec.decode(message + tail, tree)
    rng = np.random.default_rng(0)
    for bit in rng.choice(8 * len(message), size=min(400, 8 * len(message)), replace=False):
        damaged = bytearray(message)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="message"):
            codec.decode(bytes(damaged), tree)
    for other in ({"v": tree["w"]}, {"w": tree["w"].reshape(10, 6)}, {"w": tree["w"].astype(jnp.bfloat16)}):
        with pytest.raises(ValueError, match="other names, shapes or dtypes|expected"):
            codec.decode(message, other)


def rewritten(message, change):
    """The message with its payload changed by a sender whose checksum fits."""
    payload = bytearray(message[HEADER_BYTES:])
    change(payload)
    (address,) = struct.unpack_from("<I", message, 4)
    return frame(bytes(payload), address)


def test_a_payload_that_no_client_writes_is_refused():
    tree = {"x": jnp.arange(1.0, 21.0)}
    topk, rounding, elias = top_k(0.1), stochastic_rounding(3), qsgd(5, coding="elias")
    encoded = lambda codec: codec.encode(tree, codec.init(tree), jax.random.key(0))[0]

    def repeat(payload):
        payload[8:] = b"\x00\x00"  # both of 2 indices of 5 bits

    with pytest.raises(ValueError, match="names a value twice"):
        topk.decode(rewritten(encoded(topk), repeat), tree)

    def beyond(payload):
        payload[8:] = bytes([0b00001_111, 0b11_000000])  # 1 and 31, of 20 values

    with pytest.raises(ValueError, match="that the update does not have"):
        topk.decode(rewritten(encoded(topk), beyond), tree)

    def higher(payload):
        payload[4] = 0xFF  # 7 of 0..6

    with pytest.raises(ValueError, match="levels above 3"):
        rounding.decode(rewritten(encoded(rounding), higher), tree)

    def longer(payload):
        payload[4:] = bytes([0b00001000, 0]) * 2 + bytes(len(payload) - 8)  # level 7, of at most 5

    with pytest.raises(ValueError):
        elias.decode(rewritten(encoded(elias), longer), tree)
    wrong_length = frame(b"\0" * 3, struct.unpack_from("<I", encoded(rounding), 4)[0])
    with pytest.raises(ValueError, match="3 bytes of payload, expected"):
        rounding.decode(wrong_length, tree)
    with pytest.raises(ValueError, match="FMU1"):
        unframe(b"GGUF" + encoded(rounding)[4:], 0, 1000)


def test_the_header_is_as_documented():
    tree = {"x": jnp.arange(3.0)}
    message, _ = identity().encode(tree, identity().init(tree), jax.random.key(0))
    payload = np.asarray([0, 1, 2], "<f4").tobytes()
    assert message[:4] == b"FMU1" and message[8:16] == (12).to_bytes(8, "little") and message[20:] == payload
    assert message[16:20] == zlib.crc32(message[:16] + payload).to_bytes(4, "little")
