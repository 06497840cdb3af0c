"""Integers as streams of bits, the highest bit first: of a fixed width, or as Elias gamma codes with a sign.

Peter Elias, "Universal codeword sets and representations of the integers", IEEE Trans. Information Theory, 1975: gamma
of m >= 1 is floor(log2 m) zeros, then m in binary.
"""

import numpy as np


def pack(values: np.ndarray, width: int) -> bytes:
    """Unsigned integers below 2^width, width <= 32, one after another; zeros fill the last byte."""
    octets = values.reshape(-1).astype(">u4").view(np.uint8).reshape(-1, 4)
    return np.packbits(np.unpackbits(octets, axis=1)[:, 32 - width :]).tobytes()


def unpack(payload: bytes, width: int, count: int) -> np.ndarray:
    """int64 [count]: the inverse of `pack`. ValueError if the payload is shorter, or has a 1 after the last value."""
    bits = np.unpackbits(np.frombuffer(payload, np.uint8))
    if len(bits) < width * count or np.any(bits[width * count :]):
        raise ValueError(f"the payload is not {count} values of {width} bits and zeros")
    values = bits[: width * count].reshape(count, width)
    octets = np.packbits(np.pad(values, ((0, 0), (32 - width, 0))), axis=1)
    return np.ascontiguousarray(octets).view(">u4").reshape(count).astype(np.int64)


def pack_elias(levels: np.ndarray) -> bytes:
    """Elias gamma of |level| + 1 and, if the level is not 0, a bit that is 1 for a negative one; zeros fill the last
    byte. levels: integers of magnitude below 2^31."""
    levels = levels.reshape(-1).astype(np.int64)
    magnitude = np.abs(levels) + 1
    zeros = np.frexp(magnitude.astype(np.float64))[1] - 1  # floor(log2 m), exact below 2^53
    signed = levels != 0
    words = np.where(signed, magnitude << 1 | (levels < 0), magnitude)
    lengths = 2 * zeros + 1 + signed
    ends = np.cumsum(lengths)
    below = np.repeat(ends, lengths) - np.arange(int(ends[-1]) if len(ends) else 0) - 1  # bits of the word that follow
    # Shifts reach 63, for the zeros in front of the largest words of 33 bits: numpy gives 0 there.
    return np.packbits((np.repeat(words, lengths) >> below & 1).astype(np.uint8)).tobytes()


def unpack_elias(payload: bytes, count: int) -> np.ndarray:
    """int64 [count]: the inverse of `pack_elias`.

    Raises:
      ValueError: if the payload ends within a code, holds more, or a code is longer than `pack_elias` writes.
    """
    bits = np.unpackbits(np.frombuffer(payload, np.uint8))
    size = len(bits)
    here = np.arange(size)
    # The number of zeros in front of the next 1, from every bit on: codes are found by walking from one to the next.
    ones = np.where(bits == 1, here, size)
    zeros = np.minimum.accumulate(ones[::-1])[::-1] - here
    following = (here + 2 * zeros + 1 + (zeros > 0)).tolist()
    starts, at = [], 0
    for _ in range(count):
        if at >= size:
            raise ValueError("the payload ends before its last code")
        starts.append(at)
        at = following[at]
    if at > size or -(-at // 8) * 8 != size or np.any(bits[at:]):
        raise ValueError("the payload does not end with its last code")
    begin = np.asarray(starts, np.int64)
    length = zeros[begin]
    if np.any(length > 31):
        raise ValueError("a code is longer than any level's")
    magnitude = np.ones(count, np.int64)
    for bit in range(1, int(length.max(initial=0)) + 1):
        more = length >= bit
        at_bit = np.where(more, begin + length + bit, 0)
        magnitude = np.where(more, magnitude << 1 | bits[at_bit], magnitude)
    negative = bits[np.where(length > 0, begin + 2 * length + 1, 0)] * (length > 0)
    return np.where(negative == 1, 1 - magnitude, magnitude - 1)
