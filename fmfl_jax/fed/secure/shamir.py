"""Secret sharing: any t of n shares give the secret, t - 1 say nothing (Shamir, How to Share a Secret, CACM 1979).

    share(x) = s + a_1 x + ... + a_{t-1} x^{t-1} mod p,   s = sum_i share(x_i) prod_{j != i} x_j / (x_j - x_i)

A secret of 32 bytes is cut into 9 chunks of 30 bits, each shared with its own polynomial over the prime field of
p = 2^31 - 1, whose products fit in uint64.
"""

from collections.abc import Callable

import numpy as np

PRIME = 2**31 - 1
SECRET_BYTES = 32
_CHUNK_BITS = 30
_NUM_CHUNKS = -(-SECRET_BYTES * 8 // _CHUNK_BITS)
SHARE_BYTES = 4 * _NUM_CHUNKS


def split(secret: bytes, threshold: int, num_shares: int, random: Callable[[int], bytes]) -> list[bytes]:
    """num_shares shares of 36 bytes, those at x = 1, 2, ..., of which `threshold` give the secret of 32 bytes back.

    Raises ValueError unless 1 <= threshold <= num_shares < p.
    """
    if not 1 <= threshold <= num_shares < PRIME:
        raise ValueError(f"threshold must be in 1..{num_shares}, got {threshold}")
    number = int.from_bytes(secret, "little")
    chunks = [number >> (_CHUNK_BITS * i) & (2**_CHUNK_BITS - 1) for i in range(_NUM_CHUNKS)]
    coefficients = _field_elements((threshold - 1) * _NUM_CHUNKS, random).reshape(threshold - 1, _NUM_CHUNKS)
    points = np.arange(1, num_shares + 1, dtype=np.uint64)[:, None]
    shares = np.zeros((num_shares, _NUM_CHUNKS), np.uint64)
    for row in [*coefficients, np.asarray(chunks, np.uint64)]:  # Horner, the constant term last
        shares = (shares * points + row) % np.uint64(PRIME)
    return [row.tobytes() for row in shares.astype("<u4")]


def join(points: list[int], shares: list[list[bytes]]) -> list[bytes | None]:
    """Secrets from exactly the threshold's number of shares. points: [t], their x. shares: [secrets][t].

    A secret is None where the shares do not belong together and this shows (a chunk beyond 30 bits).
    """
    weights = np.asarray([_lagrange_at_zero(points, x) for x in points], np.uint64)[:, None]
    return [_join_one(weights, own) for own in shares]


def _join_one(weights, shares):
    values = np.frombuffer(b"".join(shares), "<u4").reshape(len(shares), _NUM_CHUNKS).astype(np.uint64)
    chunks = np.sum(weights * (values % np.uint64(PRIME)) % np.uint64(PRIME), axis=0) % np.uint64(PRIME)
    if np.any(chunks >> np.uint64(_CHUNK_BITS)):
        return None
    number = sum(int(chunk) << (_CHUNK_BITS * i) for i, chunk in enumerate(chunks))
    return number.to_bytes(SECRET_BYTES, "little") if number < 2 ** (8 * SECRET_BYTES) else None


def _lagrange_at_zero(points, x):
    top, bottom = 1, 1
    for other in points:
        if other != x:
            top, bottom = top * other % PRIME, bottom * (other - x) % PRIME
    return top * pow(bottom, -1, PRIME) % PRIME


def _field_elements(count: int, random: Callable[[int], bytes]) -> np.ndarray:
    """uint64 [count], uniform in 0..p-1: draws of 31 bits, of which p itself is thrown away."""
    found = np.zeros(0, np.uint32)
    while len(found) < count:
        draws = np.frombuffer(random(4 * (count - len(found))), "<u4") & np.uint32(PRIME)
        found = np.concatenate([found, draws[draws != PRIME]])
    return found.astype(np.uint64)
