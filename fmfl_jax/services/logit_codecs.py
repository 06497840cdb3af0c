"""A teacher's answer as bytes (section III-B): all logits, the k largest and the mass of the rest, or b bits a logit.

    full     16 bits a class
    top-k    k (ceil(log2 K) + 16) + 16: ids, their log-probabilities, and log(1 - sum of the k) as one more symbol
    uniform  b bits a class: 2^b levels over [max - R, max]; within R the error is e <= R / (2 (2^b - 1)), and the total
             variation of the softmax <= tanh(e / 2)

Softmax forgets a constant, so rows are sent with their largest logit at 0. A row with a NaN or an infinity arrives as
NaN, never as a number; in uniform codes it is the row without a top level. What is trained on is decode(encode(x)), and
the payload's bits are those of the bytes, rounded up to whole bytes a message. n and K are known to whoever asked.

    >>> codec = top_k(num_classes=32000, k=10, temperature=2.0)
    >>> payload = codec.encode(logits)
    >>> ids, log_masses = codec.decode(payload, len(logits))
    >>> assert 8 * len(payload) == codec.payload_bits(len(logits))
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax, logsumexp

from fmfl_jax.services.checks import positive
from fmfl_jax.transport.bits import pack, unpack

_LOWEST = -65504.0  # of float16


class LogitCodec[Decoded](NamedTuple):
    """encode(logits [n, K]) -> bytes; decode(bytes, n) -> what the student is trained on; payload_bits(n) -> their
    exact number, 8 len(bytes)."""

    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes, int], Decoded]
    payload_bits: Callable[[int], int]


class TopK(NamedTuple):
    """ids: int32 [n, k]; log_masses: float32 [n, k + 1], log-probabilities of these and, last, of all others."""

    ids: np.ndarray
    log_masses: np.ndarray


def full(num_classes: int) -> LogitCodec[np.ndarray]:
    """All logits in float16, decoded as float32 [n, K] with the row's largest at 0."""
    positive(num_classes=num_classes)
    bits = lambda n: 16 * n * num_classes

    def encode(logits):
        return np.maximum(_anchored(logits, num_classes), _LOWEST).astype("<f2").tobytes()

    def decode(payload, n):
        _check_size(payload, bits(n))
        return np.frombuffer(payload, "<f2").reshape(n, num_classes).astype(np.float32)

    return LogitCodec(encode, decode, bits)


def uniform(num_classes: int, *, bits: int, clip_range: float) -> LogitCodec[np.ndarray]:
    """`bits` a logit over [max - clip_range, max]; what lies below is raised to the lowest level. Decoded as float32
    [n, K]. Raises ValueError for bits outside 1..16 and clip_range <= 0."""
    positive(num_classes=num_classes, clip_range=clip_range)
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be in 1..16, got {bits}")
    top = 2**bits - 1
    size = lambda n: _whole_bytes(bits * n * num_classes)

    def encode(logits):
        anchored = _anchored(logits, num_classes)
        levels = np.rint(np.clip(1 + anchored / clip_range, 0, 1) * top)
        return pack(np.where(np.isnan(levels), 0, levels).astype(np.uint32), bits)

    def decode(payload, n):
        _check_size(payload, size(n))
        levels = unpack(payload, bits, n * num_classes).reshape(n, num_classes)
        known = (levels == top).any(axis=1, keepdims=True)
        return np.where(known, (levels / top - 1) * clip_range, np.nan).astype(np.float32)

    return LogitCodec(encode, decode, size)


def top_k(num_classes: int, *, k: int, temperature: float) -> LogitCodec[TopK]:
    """The k most probable symbols at this temperature and the mass of the rest (`top_k_masses`), masses in float16,
    normalized again after rounding. Raises ValueError for k outside 1..K - 1."""
    _check_k(k, num_classes)
    positive(temperature=temperature)
    id_bits = (num_classes - 1).bit_length()
    ids_bytes = lambda n: _whole_bytes(id_bits * k * n) // 8
    size = lambda n: 8 * ids_bytes(n) + 16 * (k + 1) * n

    def encode(logits):
        ids, log_masses = top_k_masses(_anchored(logits, num_classes), k=k, temperature=temperature)
        return pack(ids.astype(np.uint32), id_bits) + np.maximum(log_masses, _LOWEST).astype("<f2").tobytes()

    def decode(payload, n):
        _check_size(payload, size(n))
        ids = unpack(payload[: ids_bytes(n)], id_bits, n * k).reshape(n, k)
        log_masses = np.frombuffer(payload[ids_bytes(n) :], "<f2").reshape(n, k + 1).astype(np.float64)
        return TopK(ids.astype(np.int32), log_softmax(log_masses, axis=1).astype(np.float32))

    return LogitCodec(encode, decode, size)


def top_k_masses(logits, *, k: int, temperature: float) -> TopK:
    """The k largest of softmax(logits / temperature), largest first, and the mass of all others, which with them sums
    to 1. logits: [n, K]; a row that is not finite gives NaN."""
    logits = np.asarray(logits, np.float64)
    _check_k(k, logits.shape[1])
    logp = log_softmax(_anchored(logits, logits.shape[1]) / temperature, axis=1)
    order = np.argpartition(-logp, k - 1, axis=1)
    chosen = order[:, :k]  # [n, k], of any order
    chosen = np.take_along_axis(chosen, np.argsort(-np.take_along_axis(logp, chosen, 1), axis=1, kind="stable"), 1)
    rest = logsumexp(np.take_along_axis(logp, order[:, k:], 1), axis=1, keepdims=True)
    log_masses = np.concatenate([np.take_along_axis(logp, chosen, 1), rest], axis=1)
    return TopK(chosen.astype(np.int32), log_masses.astype(np.float32))


def total_variation_bound(error: float) -> float:
    """tanh(e / 2): how far the softmax moves at most, in total variation, where no logit moves by more than e."""
    return float(np.tanh(error / 2))


def _anchored(logits, num_classes: int) -> np.ndarray:
    """float64 [n, K] with the row's largest at 0; NaN for a whole row that is not finite."""
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or logits.shape[1] != num_classes:
        raise ValueError(f"logits must be [n, {num_classes}], got {logits.shape}")
    known = np.isfinite(logits).all(axis=1, keepdims=True)
    safe = np.where(known, logits, 0.0)
    return np.where(known, safe - safe.max(axis=1, keepdims=True), np.nan)


def _check_k(k: int, num_classes: int) -> None:
    if not 1 <= k < num_classes:
        raise ValueError(f"k must be in 1..{num_classes - 1}, the classes but one, got {k}")


def _check_size(payload: bytes, bits: int) -> None:
    if 8 * len(payload) != bits:
        raise ValueError(f"payload has {8 * len(payload)} bits, expected {bits}")


def _whole_bytes(bits: int) -> int:
    return 8 * -(-bits // 8)
