"""Codecs of updates: unbiasedness, contraction, error feedback, and payload bits counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.transport.codec import identity, keep_lost
from fmfl_jax.transport.low_rank import low_rank
from fmfl_jax.transport.quantize import elias_gamma_bits, qsgd, stochastic_rounding
from fmfl_jax.transport.sparsify import top_k

TREE = {"w": (6, 40), "b": (7,)}


def _delta(seed=0, clients=None):
    lead = () if clients is None else (clients,)
    keys = jax.random.split(jax.random.key(seed), len(TREE))
    return {name: jax.random.normal(k, lead + shape) for (name, shape), k in zip(TREE.items(), keys)}


def _norm2(tree):
    return sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(tree))


def test_identity_passes_every_bit_and_counts_by_dtype():
    delta = {"a": jnp.asarray([1.5, -0.0, jnp.nan]), "b": jnp.ones((4, 2), jnp.bfloat16)}
    codec = identity()
    decoded, _, bits = codec.apply(delta, codec.init(delta), jax.random.key(0))
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8)),
        decoded,
        delta,
    )
    assert float(bits) == codec.exact_bits(delta) == 3 * 32 + 8 * 16


def test_payload_bits_counted_by_hand():
    template = _delta()  # 240 + 7 values
    assert qsgd(7, bucket_size=100).exact_bits(template) == 247 * 4 + (3 + 1) * 32  # 15 levels: 4 bits
    assert qsgd(8, bucket_size=100).exact_bits(template) == 247 * 5 + 4 * 32  # 17 levels: 5 bits
    assert stochastic_rounding(4, bucket_size=64).exact_bits(template) == 247 * 4 + (4 + 1) * 32
    assert top_k(0.1).exact_bits(template) == 25 * (8 + 32)
    assert low_rank(2).exact_bits(template) == 32 * 2 * (6 + 40) + 7 * 32
    assert low_rank(6).exact_bits(template) == 247 * 32  # no smaller than the matrix
    assert qsgd(4, coding="elias").exact_bits(template) is None


@pytest.mark.parametrize(
    "codec, bound",
    [
        (qsgd(4, bucket_size=64), min(64 / 16, 8 / 4)),
        (stochastic_rounding(3, bucket_size=64, error_feedback=False), np.inf),
    ],
)
def test_quantizers_are_unbiased_with_bounded_variance(codec, bound):
    delta, runs = _delta(), 4000
    state = codec.init(delta)
    decoded = jax.jit(jax.vmap(lambda key: codec.apply(delta, state, key)[0]))(
        jax.random.split(jax.random.key(1), runs)
    )
    variance = 0.0
    for name in TREE:
        error = np.asarray(decoded[name]) - np.asarray(delta[name])
        # 247 coordinates at once: five standard errors.
        assert np.all(np.abs(error.mean(axis=0)) < 5.0 * error.std(axis=0) / np.sqrt(runs) + 1e-6)
        variance += float(np.sum(np.mean(np.square(error), axis=0)))
    assert 0.0 < variance <= bound * _norm2(delta)


def _elias_length(level):
    """The code written out: Elias gamma of |level| + 1, then a sign bit if not 0."""
    binary = bin(abs(level) + 1)[2:]
    return len("0" * (len(binary) - 1) + binary) + (level != 0)


def test_elias_payload_is_the_length_of_a_written_code():
    levels = np.asarray([0, 1, -1, 2, 3, -7, 8, 100, 0, 127])
    assert float(elias_gamma_bits(jnp.asarray(levels))) == sum(_elias_length(int(v)) for v in levels)
    delta = {"x": jax.random.normal(jax.random.key(0), (1000,))}
    fixed, coded = qsgd(16, bucket_size=500), qsgd(16, bucket_size=500, coding="elias")
    values, state, bits = jax.jit(fixed.apply)(delta, fixed.init(delta), jax.random.key(1))
    same, coded_state, coded_bits = jax.jit(coded.apply)(delta, coded.init(delta), jax.random.key(1))
    np.testing.assert_array_equal(values["x"], same["x"])
    norms = np.sqrt(np.sum(np.square(np.asarray(delta["x"]).reshape(2, 500)), axis=1, keepdims=True))
    sent = np.rint(np.asarray(values["x"]).reshape(2, 500) / norms * 16).astype(int).reshape(-1)
    assert float(coded_bits) == sum(_elias_length(int(v)) for v in sent) + 2 * 32
    share = np.unique(sent, return_counts=True)[1] / 1000
    assert float(state.entropy_bits) == pytest.approx(-1000 * np.sum(share * np.log2(share)) + 64, rel=1e-5)
    assert float(coded_state.entropy_bits) < float(coded_bits) < float(bits)


@pytest.mark.parametrize(
    "codec",
    [
        top_k(0.1),
        low_rank(1),
        stochastic_rounding(3, bucket_size=64),
        qsgd(16, bucket_size=16, error_feedback=True),
    ],
)
def test_error_feedback_owes_exactly_what_was_not_sent(codec):
    """After n rounds: sum of decoded + residual = sum of deltas; a constant delta arrives in full on average."""
    delta = _delta(3)
    step = jax.jit(codec.apply)
    state, sent, rounds = codec.init(delta), jax.tree.map(jnp.zeros_like, delta), 40
    for i in range(rounds):
        decoded, state, bits = step(delta, state, jax.random.key(i))
        sent = jax.tree.map(jnp.add, sent, decoded)
        assert float(bits) == codec.exact_bits(delta)
    jax.tree.map(
        lambda s, r, d: np.testing.assert_allclose(s + r, rounds * d, rtol=1e-4, atol=1e-3), sent, state.residual, delta
    )
    assert _norm2(state.residual) < 0.4 * _norm2(jax.tree.map(lambda d: rounds * d, delta))


def test_top_k_keeps_the_largest_and_a_lost_update_is_kept():
    delta = {"x": jnp.asarray([3.0, -5.0, 1.0, 0.5])}
    codec = top_k(0.5)
    decoded, state, _ = codec.apply(delta, codec.init(delta), jax.random.key(0))
    np.testing.assert_array_equal(decoded["x"], [3.0, -5.0, 0.0, 0.0])
    np.testing.assert_array_equal(keep_lost(state, decoded, jnp.asarray(True)).residual["x"], [0.0, 0.0, 1.0, 0.5])
    np.testing.assert_array_equal(keep_lost(state, decoded, jnp.asarray(False)).residual["x"], delta["x"])


def test_low_rank_is_exact_on_low_rank_updates():
    key = jax.random.key(0)
    delta = {"w": jax.random.normal(key, (20, 2)) @ jax.random.normal(key, (2, 30))}
    codec = low_rank(2)
    decoded, _, _ = codec.apply(delta, codec.init(delta), key)
    np.testing.assert_allclose(decoded["w"], delta["w"], atol=1e-4)
    zero = {"w": jnp.zeros((20, 30))}
    decoded, state, _ = codec.apply(zero, codec.init(zero), key)
    assert np.all(decoded["w"] == 0.0) and np.all(np.isfinite(state.extra[0])) and np.any(state.extra[0] != 0.0)


@pytest.mark.parametrize("codec", [identity(), qsgd(8, coding="elias"), top_k(0.2), low_rank(1)])
def test_vmap_over_clients_equals_one_by_one(codec):
    deltas, keys = _delta(1, clients=3), jax.random.split(jax.random.key(2), 3)
    states = jax.vmap(codec.init)(deltas)
    decoded, _, bits = jax.jit(jax.vmap(codec.apply))(deltas, states, keys)
    apply = jax.jit(codec.apply)
    assert bits.shape == (3,)
    for i in range(3):
        one = jax.tree.map(lambda leaf: leaf[i], deltas)
        alone, _, alone_bits = apply(one, codec.init(one), keys[i])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[i], b, atol=2e-5), decoded, alone)
        assert float(bits[i]) == float(alone_bits)


def test_refusals():
    with pytest.raises(ValueError, match="variance bound below 1"):
        qsgd(2, bucket_size=512, error_feedback=True)
    for bad in (
        lambda: qsgd(0),
        lambda: top_k(0.0),
        lambda: low_rank(0),
        lambda: stochastic_rounding(1),
        lambda: qsgd(4, coding="huffman"),
    ):
        with pytest.raises(ValueError):
            bad()
