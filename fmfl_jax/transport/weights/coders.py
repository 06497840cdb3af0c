"""Lossless coders of a tensor's bytes. All entropy coding is zstd's: where a plane of bytes has no repetitions, what is
left of zstd is its Huffman stage, which takes an exponent to within .06 bits of its entropy.

    raw      the bytes
    zstd     for headers, tokenizers and whatever has repetitions
    floats   F32, F16, BF16: bits rotated by one, so that the highest byte is the exponent (of F16 with the mantissa's
             first 3 bits); that byte's plane is coded, and any other that gains; mantissas of weights do not
    blocks   4- to 8-bit blocks of GGUF: the bytes of the scales each a plane, the integers one
    delta    floats against a base of the same dtype and shape: bits are mapped to integers in the floats' order, and
             the differences sent: which are not 0 as a plane of bits, then, of these, zigzag - 1 by planes of bytes.
             (The integer difference beats XOR, of which a carry fills many bits.)

A coded tensor of several planes is the length of each (uint64, little-endian), then the planes; a plane as long as
without coding is not coded. The decoded size is known beforehand and nothing larger is ever allocated.
"""

import struct
from typing import NamedTuple

import numpy as np
import zstandard

from fmfl_jax.transport.weights.hash_tree import Octets

FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


class Block(NamedTuple):
    """A GGUF type: bytes of a block, and how many of them, at its front, are scales."""

    block_bytes: int
    scale_bytes: int


# ggml-common.h of https://github.com/ggml-org/llama.cpp: d, then m, then (Q5) the high bits, then the low ones.
BLOCKS = {"Q4_0": Block(18, 2), "Q4_1": Block(20, 4), "Q5_0": Block(22, 2), "Q5_1": Block(24, 4), "Q8_0": Block(34, 2)}

CODERS = ("raw", "zstd", "floats", "blocks", "delta")
_LEVEL, _TEXT_LEVEL = 3, 12
# The short repetitions that zstd's levels find among random exponents cost more than they save (2.88 bits an exponent
# at level 1, where Huffman takes 2.60): long ones only, and few places to look for them.
_PLANES = zstandard.ZstdCompressionParameters(
    window_log=17, hash_log=6, chain_log=6, search_log=1, min_match=7, strategy=zstandard.STRATEGY_FAST
)
_PIECE = 2**20  # bytes handled at a time: they stay in the cache


def encode(data: Octets, dtype: str, base: Octets | None = None) -> tuple[str, bytes]:
    """(coder, coded bytes) of a tensor: by what its dtype allows, raw where that gains nothing.

    dtype: as safetensors or GGUF name it, or "" for bytes that are no tensor. base: the same tensor of the base.
    """
    if dtype in FLOAT_BYTES:
        found = {}
        if base is not None and len(base) == len(data):
            found["delta"] = _encode_delta(data, base, FLOAT_BYTES[dtype])
        if not found or len(found["delta"]) > len(data) // 2:  # where plain coding may be better
            found["floats"] = _join_planes(_float_planes(data, FLOAT_BYTES[dtype]))
    elif dtype in BLOCKS:
        found = {"blocks": _join_planes(_block_planes(data, BLOCKS[dtype]))}
    else:
        found = {"zstd": zstandard.ZstdCompressor(level=_LEVEL if dtype else _TEXT_LEVEL).compress(data)}
    coder = min(found, key=lambda name: len(found[name]))
    return (coder, found[coder]) if len(found[coder]) < len(data) else ("raw", bytes(data))


def decode(coder: str, coded: Octets, dtype: str, nbytes: int, base: Octets | None = None) -> Octets:
    """The tensor's `nbytes` bytes.

    Raises:
      ValueError: if `coded` is not what `encode` makes of so many bytes, or a delta comes without its base.
    """
    if coder == "raw":
        if len(coded) != nbytes:
            raise ValueError(f"{len(coded)} raw bytes, expected {nbytes}")
        return coded
    if coder == "zstd":
        return _unzstd(coded, nbytes)
    if coder == "blocks" and dtype in BLOCKS:
        return _decode_blocks(coded, nbytes, BLOCKS[dtype])
    if coder not in ("floats", "delta") or dtype not in FLOAT_BYTES or nbytes % FLOAT_BYTES[dtype]:
        raise ValueError(f"coder {coder!r} of {nbytes} bytes of {dtype!r}: not known")
    if coder == "floats":
        return _decode_floats(coded, nbytes, FLOAT_BYTES[dtype])
    if base is None or len(base) != nbytes:
        raise ValueError("a delta needs its base, of the same size")
    return _decode_delta(coded, base, FLOAT_BYTES[dtype])


def _plane(plane: Octets | np.ndarray) -> bytes:
    """zstd's, or the plane itself where that is no smaller."""
    plane = np.ascontiguousarray(plane).data if isinstance(plane, np.ndarray) else plane
    coded = zstandard.ZstdCompressor(compression_params=_PLANES).compress(plane)
    return coded if len(coded) < len(plane) else bytes(plane)


def _unzstd(coded, nbytes: int) -> bytes:
    try:
        # Without this a frame that names no size, or a larger one, is decoded to whatever comes.
        if zstandard.get_frame_parameters(coded).content_size != nbytes:
            raise ValueError(f"zstd frame of another size than {nbytes} bytes")
        return zstandard.ZstdDecompressor(max_window_size=2**27).decompress(
            coded, max_output_size=nbytes, allow_extra_data=False
        )
    except zstandard.ZstdError as e:
        raise ValueError(f"damaged zstd frame ({e})") from None


def _join_planes(planes: list) -> bytes:
    coded = [_plane(plane) for plane in planes]
    return b"".join((struct.pack(f"<{len(coded)}Q", *map(len, coded)), *coded))


def _split_planes(coded, sizes: list[int]) -> list:
    """The planes, of these sizes."""
    header = 8 * len(sizes)
    if len(coded) < header:
        raise ValueError(f"{len(coded)} coded bytes, shorter than their header of {header}")
    lengths = struct.unpack_from(f"<{len(sizes)}Q", coded)
    if header + sum(lengths) != len(coded) or any(n > size for n, size in zip(lengths, sizes)):
        raise ValueError("planes are not of the announced lengths")
    planes, at = [], header
    for length, size in zip(lengths, sizes):
        plane = memoryview(coded)[at : at + length]
        planes.append(plane if length == size else _unzstd(plane, size))
        at += length
    return planes


def _words(data, width: int) -> np.ndarray:
    return np.frombuffer(data, f"<u{width}")


def _float_planes(data, width: int) -> list[np.ndarray]:
    """The bytes of the rotated words, the lowest first: uint8 [n] each."""
    words = _words(data, width)
    planes = np.empty((width, len(words)), np.uint8)
    step = _PIECE // width
    for at in range(0, len(words), step):
        part = words[at : at + step]
        rotated = part << part.dtype.type(1) | part >> part.dtype.type(8 * width - 1)
        planes[:, at : at + step] = rotated.view(np.uint8).reshape(-1, width).T
    return list(planes)


def _decode_floats(coded, nbytes: int, width: int) -> bytearray:
    planes = [np.frombuffer(p, np.uint8) for p in _split_planes(coded, [nbytes // width] * width)]
    out = bytearray(nbytes)
    words, step = np.frombuffer(out, f"<u{width}"), _PIECE // width
    for at in range(0, len(words), step):
        rotated = np.empty((min(step, len(words) - at), width), np.uint8)
        for column, plane in enumerate(planes):
            rotated[:, column] = plane[at : at + step]
        part = rotated.view(f"<u{width}")[:, 0]
        np.bitwise_or(part >> part.dtype.type(1), part << part.dtype.type(8 * width - 1), out=words[at : at + step])
    return out


def _block_planes(data, block: Block) -> list[np.ndarray]:
    """Each byte of the scales, uint8 [blocks], then all others."""
    blocks = np.frombuffer(data, np.uint8).reshape(-1, block.block_bytes)
    return [*blocks[:, : block.scale_bytes].T, blocks[:, block.scale_bytes :].reshape(-1)]


def _decode_blocks(coded, nbytes: int, block: Block) -> bytearray:
    count, rest = divmod(nbytes, block.block_bytes)
    if rest:
        raise ValueError(f"{nbytes} bytes are no whole blocks of {block.block_bytes}")
    integers = count * (block.block_bytes - block.scale_bytes)
    planes = [np.frombuffer(p, np.uint8) for p in _split_planes(coded, [count] * block.scale_bytes + [integers])]
    out = bytearray(nbytes)
    blocks = np.frombuffer(out, np.uint8).reshape(count, block.block_bytes)
    for column, plane in enumerate(planes[:-1]):
        blocks[:, column] = plane
    blocks[:, block.scale_bytes :] = planes[-1].reshape(count, -1)
    return out


def _monotone(words: np.ndarray) -> np.ndarray:
    """Unsigned integers in the order of the floats whose bits the words are: negative ones inverted, the others moved
    above them."""
    last = 8 * words.itemsize - 1
    negative = (words.view(f"<i{words.itemsize}") >> last).view(words.dtype)  # all bits, or none
    return words ^ (negative | words.dtype.type(1 << last))


def _from_monotone(codes: np.ndarray) -> np.ndarray:
    last = 8 * codes.itemsize - 1
    positive = (codes.view(f"<i{codes.itemsize}") >> last).view(codes.dtype)
    return codes ^ (~positive | codes.dtype.type(1 << last))


def _encode_delta(data, base, width: int) -> bytes:
    new, old, step = _words(data, width), _words(base, width), _PIECE // width
    flags, differences = [np.zeros(0, np.uint8)], [new[:0]]
    for at in range(0, len(new), step):  # a multiple of 8 values
        difference = _monotone(new[at : at + step]) - _monotone(old[at : at + step])  # modulo 2^bits
        changed = difference != 0
        flags.append(np.packbits(changed))
        differences.append(difference[changed])
    signed = np.concatenate(differences).view(f"<i{width}")
    zigzag = ((signed << 1) ^ (signed >> 8 * width - 1)).view(f"<u{width}") - new.dtype.type(1)
    plane = _plane(np.concatenate(flags))
    planes = _join_planes(list(zigzag.view(np.uint8).reshape(-1, width).T))
    return struct.pack("<QQ", len(plane), len(signed)) + plane + planes


def _decode_delta(coded, base, width: int) -> bytes:
    words = _words(base, width)
    flag_bytes = -(-len(words) // 8)
    if len(coded) < 16:
        raise ValueError(f"{len(coded)} coded bytes, shorter than a delta's header")
    length, count = struct.unpack_from("<QQ", coded)
    rest = memoryview(coded)[16:]
    if length > min(flag_bytes, len(rest)):
        raise ValueError("the plane of what changed is longer than announced")
    flags = rest[:length] if length == flag_bytes else _unzstd(rest[:length], flag_bytes)
    packed = np.frombuffer(flags, np.uint8)
    if int(np.bitwise_count(packed).sum(dtype=np.int64)) != count or np.any(
        np.unpackbits(packed[-1:])[len(words) % 8 or 8 :]
    ):
        raise ValueError("the plane of what changed has another number of ones than announced")
    planes = _split_planes(rest[length:], [count] * width)
    zigzag = np.empty((count, width), np.uint8)
    for column, plane in enumerate(planes):
        zigzag[:, column] = np.frombuffer(plane, np.uint8)
    kind = words.dtype.type
    unsigned = zigzag.view(f"<u{width}").reshape(count) + kind(1)
    differences = (unsigned >> kind(1)) ^ (kind(0) - (unsigned & kind(1)))
    out, step, used = np.empty_like(words), _PIECE // width, 0
    for at in range(0, len(words), step):
        codes = _monotone(words[at : at + step])
        changed = np.unpackbits(packed[at // 8 : (at + step) // 8], count=len(codes)).view(bool)
        more = np.zeros_like(codes)
        number = int(np.count_nonzero(changed))
        more[changed] = differences[used : used + number]
        out[at : at + step] = _from_monotone(codes + more)
        used += number
    return out.tobytes()
