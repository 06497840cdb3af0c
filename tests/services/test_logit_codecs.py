"""Logit codecs: bytes counted by hand, what is decoded, the error's bounds, and NaN that arrives as NaN."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from fmfl_jax.services import logit_codecs as codecs

CODECS = {
    "full": codecs.full(37),
    "4 bits": codecs.uniform(37, bits=4, clip_range=12.0),
    "1 bit": codecs.uniform(37, bits=1, clip_range=3.0),
    "top-5": codecs.top_k(37, k=5, temperature=2.0),
    "top-36": codecs.top_k(37, k=36, temperature=1.0),
}


def logits_of(n, num_classes=37, seed=0):
    return 4 * np.random.default_rng(seed).normal(size=(n, num_classes))


def test_bytes_a_token_of_the_golden():
    assert codecs.full(32_000).payload_bits(1) == 8 * 64_000
    # 16-bit ids as in the golden: 40 and 200 bytes, and 2 for the mass of the rest
    assert codecs.top_k(65_536, k=10, temperature=1.0).payload_bits(1) == 8 * (40 + 2)
    assert codecs.top_k(65_536, k=50, temperature=1.0).payload_bits(1) == 8 * (200 + 2)
    assert codecs.top_k(32_000, k=10, temperature=1.0).payload_bits(8) == 8 * (10 * (15 + 16) + 16)
    assert codecs.uniform(4, bits=3, clip_range=1.0).payload_bits(2) == 24


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("n", [1, 9])
def test_the_payload_is_the_bytes_and_decoding_again_changes_nothing(name, n):
    codec = CODECS[name]
    payload = codec.encode(logits_of(n))
    assert isinstance(payload, bytes) and 8 * len(payload) == codec.payload_bits(n)
    decoded, again = codec.decode(payload, n), codec.decode(payload, n)
    np.testing.assert_equal(decoded, again)
    if not isinstance(decoded, codecs.TopK):
        assert codec.encode(decoded) == payload and (decoded.max(axis=1) == 0).all()
    shifted = codec.decode(codec.encode(logits_of(n) + 100.0), n)
    np.testing.assert_allclose(np.hstack(list(shifted)), np.hstack(list(decoded)), atol=1e-6)
    with pytest.raises(ValueError, match="payload has"):
        codec.decode(payload + b"\0", n)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_arrives_as_nan_and_alone(name, bad):
    logits = logits_of(4)
    whole = CODECS[name].decode(CODECS[name].encode(logits), 4)
    logits[2, 7] = bad
    broken = CODECS[name].decode(CODECS[name].encode(logits), 4)
    values, before = (x.log_masses if isinstance(x, codecs.TopK) else x for x in (broken, whole))
    assert np.isnan(values[2]).all()
    np.testing.assert_array_equal(np.delete(values, 2, axis=0), np.delete(before, 2, axis=0))


@pytest.mark.parametrize("k", [1, 5, 36])
def test_top_k_masses_are_exact_and_survive_the_wire(k):
    logits = logits_of(50)
    ids, log_masses = codecs.top_k_masses(logits, k=k, temperature=2.0)
    p = softmax(logits / 2, axis=1)
    np.testing.assert_array_equal(ids, np.argsort(-p, axis=1)[:, :k])
    np.testing.assert_allclose(np.exp(log_masses[:, :k]), -np.sort(-p, axis=1)[:, :k], rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_masses.astype(np.float64)).sum(axis=1), 1.0, atol=1e-6)
    codec = codecs.top_k(37, k=k, temperature=2.0)
    sent = codec.decode(codec.encode(logits), 50)
    np.testing.assert_array_equal(sent.ids, ids)
    np.testing.assert_allclose(np.exp(sent.log_masses), np.exp(log_masses), atol=2e-3)
    np.testing.assert_allclose(np.exp(sent.log_masses).sum(axis=1), 1.0, atol=1e-6)


def test_a_certain_teacher_leaves_a_finite_tail():
    sent, sure = codecs.top_k(3, k=1, temperature=1.0), np.asarray([[2e5, 0.0, 0.0]])  # beyond float16
    found = sent.decode(sent.encode(sure), 1)
    assert np.isfinite(found.log_masses).all() and np.exp(found.log_masses[0, 0]) == 1
    whole = codecs.full(3)
    np.testing.assert_array_equal(whole.decode(whole.encode(sure), 1), [[0, -65504, -65504]])


@pytest.mark.parametrize("bits", [1, 2, 3, 8, 16])
def test_uniform_error_and_the_softmax_it_moves(bits):
    logits, clip_range = logits_of(200), 40.0  # nothing is clipped
    codec = codecs.uniform(37, bits=bits, clip_range=clip_range)
    decoded = codec.decode(codec.encode(logits), 200)
    error = clip_range / (2 * (2**bits - 1))
    anchored = logits - logits.max(axis=1, keepdims=True)
    assert np.abs(decoded - anchored).max() <= error + 4e-6  # float32 at 40
    moved = np.abs(softmax(decoded.astype(float), axis=1) - softmax(logits, axis=1)).sum(axis=1) / 2
    assert moved.max() <= codecs.total_variation_bound(error + 4e-6)


def test_the_bound_is_attained_and_what_is_clipped_goes_to_the_lowest_level():
    for error in (0.1, 1.0):  # p = 1 / (1 + e^error), each logit off by the error against the other
        p, q = softmax([0.0, error]), softmax([error, 0.0])
        assert p[0] == pytest.approx(1 / (1 + np.exp(error)))
        assert abs(p - q).sum() / 2 == pytest.approx(codecs.total_variation_bound(error))
    codec = codecs.uniform(3, bits=2, clip_range=3.0)
    np.testing.assert_allclose(codec.decode(codec.encode(np.asarray([[5.0, 3.9, -50.0]])), 1), [[0.0, -1.0, -3.0]])


def test_full_keeps_probabilities_to_float16():
    logits = logits_of(100)
    decoded = CODECS["full"].decode(CODECS["full"].encode(logits), 100)
    np.testing.assert_allclose(log_softmax(decoded.astype(float), axis=1), log_softmax(logits, axis=1), atol=0.02)


def test_bad_settings_are_one_line():
    with pytest.raises(ValueError, match="bits must be in 1..16, got 0"):
        codecs.uniform(4, bits=0, clip_range=1.0)
    with pytest.raises(ValueError, match="k must be in 1..3, the classes but one, got 4"):
        codecs.top_k(4, k=4, temperature=1.0)
    with pytest.raises(ValueError, match=r"logits must be \[n, 4\], got \(2, 3\)"):
        codecs.full(4).encode(np.zeros((2, 3)))
