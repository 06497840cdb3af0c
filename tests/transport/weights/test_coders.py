"""Coders: lossless whatever the bits, near the entropy, and nothing larger than announced is decoded."""

import struct

import ml_dtypes
import numpy as np
import pytest
import zstandard

from fmfl_jax.transport.weights.coders import BLOCKS, FLOAT_BYTES, decode, encode

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def weights(dtype, n, seed=0):
    values = np.random.default_rng(seed).normal(size=n) * 0.02
    return values.astype(DTYPES[dtype])


def every_kind(width, rng):
    """Bits of all sorts: NaNs, infinities, both zeros, denormals."""
    special = [0, 1, (1 << 8 * width - 1), (1 << 8 * width) - 1, 0x7F80 << 8 * (width - 2), 0xFF80 << 8 * (width - 2)]
    words = rng.integers(0, 2 ** (8 * width), size=1000, dtype=np.uint64)
    return np.concatenate([words, np.asarray(special, np.uint64)]).astype(f"<u{width}").tobytes()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q4_1", "Q8_0", "I32", ""])
def test_any_bytes_come_back(dtype):
    rng = np.random.default_rng(1)
    unit = FLOAT_BYTES.get(dtype) or (BLOCKS[dtype].block_bytes if dtype in BLOCKS else 4)
    for count in (0, 1, 2, 7, 300_000):
        for data in (rng.bytes(unit * count), bytes(unit * count), bytes(range(unit)) * count):
            coder, coded = encode(data, dtype)
            assert bytes(decode(coder, coded, dtype, len(data))) == data
            assert len(coded) <= len(data)


@pytest.mark.parametrize("dtype", DTYPES)
def test_deltas_come_back(dtype):
    rng = np.random.default_rng(2)
    for seed in range(3):
        base, data = every_kind(FLOAT_BYTES[dtype], rng), bytearray(every_kind(FLOAT_BYTES[dtype], rng))
        data[: len(data) // 2 * seed] = base[: len(data) // 2 * seed]  # none, half, all as in the base
        coder, coded = encode(data, dtype, base)
        assert bytes(decode(coder, coded, dtype, len(data), base)) == data
        assert coder == "delta" if seed else len(coded) <= len(data)
    old = weights(dtype, 9999)
    new = (old.astype(np.float32) * (1 + 1e-3 * rng.normal(size=9999))).astype(old.dtype)
    coder, coded = encode(new.tobytes(), dtype, old.tobytes())
    assert coder == "delta" and bytes(decode(coder, coded, dtype, new.nbytes, old.tobytes())) == new.tobytes()


def entropy(symbols):
    share = np.unique(symbols, return_counts=True)[1] / symbols.size
    return float(-np.sum(share * np.log2(share)))


def test_exponents_cost_their_entropy():
    x = weights("BF16", 2**20)
    exponents = x.view(np.uint16) >> 7 & 0xFF
    coder, coded = encode(x.tobytes(), "BF16")
    assert coder == "floats"
    assert 8 + entropy(exponents) <= 8 * len(coded) / x.size < 8 + entropy(exponents) + 0.07


def test_deltas_cost_their_entropy():
    old = weights("BF16", 2**20)
    change = 1e-3 * np.std(old.astype(np.float32)) * np.random.default_rng(5).normal(size=old.size)
    new = (old.astype(np.float32) + change).astype(ml_dtypes.bfloat16)
    ordered = lambda x: np.where(x.view(np.int16) < 0, -(x.view(np.int16) & 0x7FFF) - 1, x.view(np.int16)).astype(int)
    floor = entropy(ordered(new) - ordered(old))
    _, coded = encode(new.tobytes(), "BF16", old.tobytes())
    assert 0.7 < np.mean(new == old) < 0.85
    assert floor * 0.999 < 8 * len(coded) / old.size < floor + 0.1


def test_blocks_gain_what_separate_planes_gain():
    rng = np.random.default_rng(3)
    scales = (0.01 * (1 + 0.1 * rng.random((5000, 2)))).astype("<f2").view(np.uint8)
    nibbles = np.clip(rng.normal(8, 2.5, size=(5000, 32)), 0, 15).astype(np.uint8)
    data = np.concatenate([scales, nibbles[:, :16] | nibbles[:, 16:] << 4], axis=1).tobytes()
    coder, coded = encode(data, "Q4_1")
    assert coder == "blocks" and len(coded) < 0.95 * len(zstandard.ZstdCompressor(level=19).compress(data))


def test_damage_gives_an_error_or_bytes_of_the_announced_size():
    rng = np.random.default_rng(4)
    x, base = weights("BF16", 3000), weights("BF16", 3000, seed=1)
    near = (x.astype(np.float32) * 1.001).astype(x.dtype)
    block = np.tile(rng.integers(0, 9, 180, dtype=np.uint8), 30).tobytes()
    coded = [
        ("BF16", x.nbytes, None, *encode(x.tobytes(), "BF16")),
        ("BF16", x.nbytes, x.tobytes(), *encode(near.tobytes(), "BF16", x.tobytes())),
        ("Q4_1", len(block), None, *encode(block, "Q4_1")),
        ("", 3000, None, *encode(bytes(3000), "")),
    ]
    assert [c[3] for c in coded] == ["floats", "delta", "blocks", "zstd"] and base.size == x.size
    errors = 0
    for dtype, nbytes, before, coder, data in coded:
        for _ in range(150):
            damaged = bytearray(data)
            damaged[rng.integers(min(len(data), 80 if rng.random() < 0.5 else len(data)))] ^= rng.integers(1, 256)
            try:
                assert len(decode(coder, bytes(damaged), dtype, nbytes, before)) == nbytes
            except ValueError:
                errors += 1
        for size in (0, 1, 7, 15, len(data) // 2, len(data) - 1):
            with pytest.raises(ValueError):
                decode(coder, data[:size], dtype, nbytes, before)
        with pytest.raises(ValueError):
            decode(coder, data + b"\0", dtype, nbytes, before)
    assert errors > 100


def test_a_bomb_is_not_unpacked():
    bomb = zstandard.ZstdCompressor().compress(bytes(2**24))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**24))
    for frame in (bomb, unsized):
        with pytest.raises(ValueError, match="another size than 1000"):
            decode("zstd", frame, "", 1000)
        planes = struct.pack("<2Q", len(frame), 10**5) + frame + bytes(10**5)
        with pytest.raises(ValueError, match="another size"):
            decode("floats", planes, "BF16", 2 * 10**5)
    with pytest.raises(ValueError, match="needs its base"):
        decode("delta", b"", "BF16", 10)
    with pytest.raises(ValueError, match="not known"):
        decode("floats", b"", "I32", 8)
    x = weights("BF16", 1000)
    coder, coded = encode(x.tobytes(), "BF16", x.tobytes())
    with pytest.raises(ValueError, match="another number of ones"):
        decode(coder, coded[:8] + struct.pack("<Q", 1) + coded[16:], "BF16", x.nbytes, x.tobytes())
