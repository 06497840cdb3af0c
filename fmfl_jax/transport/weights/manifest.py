"""What a container of weights says about itself, signed: which files, of which parts, coded how, in which chunks.

A container is one file:

    8   "FMWEIGH1"
    4   length of the manifest, bytes, little-endian
    n   the manifest, JSON
    64  Ed25519 signature of a fixed text and the manifest
        then the coded parts, one after another, cut into chunks of chunk_bytes (the last may be shorter)

The parts are in the order in which a model needs them: what stands before the first layer (tied embeddings with it),
then layer by layer. The manifest has the hash of every chunk, and their tree's root (hash_tree.py), which names the
container; the hash of every part's decoded bytes, and their tree's root, the content, which names what is in it however
it is coded. A delta names the content of its base.
"""

import dataclasses
import json
import pathlib
import re
import struct
from collections.abc import Iterable
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fmfl_jax.transport.weights import hash_tree
from fmfl_jax.transport.weights.coders import CODERS

MAGIC = b"FMWEIGH1"
PREFIX_BYTES = len(MAGIC) + 4
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 2**16, 2**20
_SIGNED_FOR = b"fmfl_jax container of weights 1\x00"  # a signature for anything else is none here
_SIGNATURE_BYTES = 64
_MAX_MANIFEST_BYTES = 2**26
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Some bytes of a file: a tensor, or what stands between tensors.

    name: the tensor's, or "" . dtype: as the file's format names it, "" where it is no tensor. shape: of the tensor.
    stage: 0 before the first layer, then the layer's number from 1 on, then what stands behind the last layer.
    file, offset, nbytes: where it lies when decoded. coder, coded_offset, coded_bytes: where it lies in the container.
    content: SHA-256 of the decoded bytes, as of a leaf of the tree.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stage: int
    file: str
    offset: int
    nbytes: int
    coder: str
    coded_offset: int
    coded_bytes: int
    content: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """A container's. version: of the model, the publisher's. files: {path: bytes}. chunks: hashes, in hex. base: the
    content that deltas are against, or None.

    Raises:
      ValueError: if parts overlap or leave gaps, in the container or in their files, a path leads out of the folder, a
        root does not fit its leaves, or a number makes no sense.
    """

    name: str
    version: int
    files: dict[str, int]
    parts: tuple[Part, ...]
    chunk_bytes: int
    chunks: tuple[str, ...]
    root: str
    content: str
    base: str | None = None

    def __post_init__(self):
        if not MIN_CHUNK_BYTES <= self.chunk_bytes <= MAX_CHUNK_BYTES:
            raise ValueError(f"chunk_bytes={self.chunk_bytes}: expected {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES}")
        hashes = (*self.chunks, *(p.content for p in self.parts), self.base or self.root)
        if not all(isinstance(h, str) and _HASH.fullmatch(h) for h in hashes):
            raise ValueError("a hash is not 64 hexadecimal digits")
        _check_layout(self)
        if len(self.chunks) != -(-self.coded_bytes // self.chunk_bytes):
            raise ValueError(f"{len(self.chunks)} chunks of {self.chunk_bytes} bytes for {self.coded_bytes} bytes")
        if tree_root(self.chunks) != self.root:
            raise ValueError("wrong root: the hashes of the chunks do not lead to it")
        if tree_root(p.content for p in self.parts) != self.content:
            raise ValueError("wrong content: the hashes of the parts do not lead to it")
        if (self.base is None) == any(p.coder == "delta" for p in self.parts):
            raise ValueError("a base is named where there are deltas, and only there")

    @property
    def coded_bytes(self) -> int:
        """All chunks together."""
        return self.parts[-1].coded_offset + self.parts[-1].coded_bytes if self.parts else 0

    @property
    def decoded_bytes(self) -> int:
        """All files together."""
        return sum(self.files.values())

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """Where a chunk begins and ends among the coded bytes."""
        return chunk * self.chunk_bytes, min((chunk + 1) * self.chunk_bytes, self.coded_bytes)


def read_public_key(given: str) -> Ed25519PublicKey:
    """A publisher's key: 64 hexadecimal digits, or a file with them. Raises ValueError."""
    text = pathlib.Path(given).read_text(encoding="utf-8").strip() if pathlib.Path(given).is_file() else given
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))
    except ValueError:
        raise ValueError(f"{given}: expected a file with, or, 64 hexadecimal digits") from None


def tree_root(leaves: Iterable[str]) -> str:
    """Of leaves in hex, in hex."""
    return hash_tree.root([bytes.fromhex(h) for h in leaves]).hex()


def sealed(manifest: Manifest, key: Ed25519PrivateKey) -> bytes:
    """The head of the container: all that stands before the chunks."""
    text = json.dumps(dataclasses.asdict(manifest), separators=(",", ":"), sort_keys=True).encode()
    return MAGIC + struct.pack("<I", len(text)) + text + key.sign(_SIGNED_FOR + text)


def head_bytes(prefix: bytes) -> int:
    """The length of the head that begins with these PREFIX_BYTES bytes. ValueError if it is no head."""
    if len(prefix) < PREFIX_BYTES or not prefix.startswith(MAGIC):
        raise ValueError(f"not a container of weights: it does not begin with {MAGIC.decode()}")
    (length,) = struct.unpack_from("<I", prefix, len(MAGIC))
    if length > _MAX_MANIFEST_BYTES:
        raise ValueError(f"a manifest of {length} bytes, expected at most {_MAX_MANIFEST_BYTES}")
    return PREFIX_BYTES + length + _SIGNATURE_BYTES


def opened(head: bytes, key: Ed25519PublicKey) -> Manifest:
    """The manifest, after its signature is verified.

    Raises:
      ValueError: if the head is damaged, signed by another key or not what `Manifest` allows.
    """
    if len(head) != head_bytes(head[:PREFIX_BYTES]):
        raise ValueError(f"a head of {len(head)} bytes, expected {head_bytes(head[:PREFIX_BYTES])}")
    text, signature = head[PREFIX_BYTES:-_SIGNATURE_BYTES], head[-_SIGNATURE_BYTES:]
    try:
        key.verify(signature, _SIGNED_FOR + text)
    except InvalidSignature:
        raise ValueError("wrong signature: the manifest was changed, or signed with another key") from None
    try:
        return _parsed(json.loads(text))
    except (KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"the manifest is not of this format ({e})") from None


def _parsed(found: dict[str, Any]) -> Manifest:
    """Types are checked here, what they mean by `Manifest`."""
    parts = tuple(_typed(Part, part, shape=tuple(map(int, part["shape"]))) for part in found["parts"])
    if not all(type(size) is int for size in found["files"].values()):
        raise TypeError("files")
    return _typed(Manifest, found, parts=parts, chunks=tuple(found["chunks"]))


def _typed(kind: Any, found: dict[str, Any], **fields) -> Any:
    """The dataclass of what was found and these fields; TypeError where a number or a text is not one."""
    for field in dataclasses.fields(kind):
        if field.type in (int, str) and type(found[field.name]) is not field.type:
            raise TypeError(field.name)
    return kind(**(found | fields))


def _check_layout(manifest: Manifest) -> None:
    at, covered, last_stage = 0, {name: [] for name in manifest.files}, 0
    for part in manifest.parts:
        if part.file not in covered:
            raise ValueError(f"a part of {part.file!r}, which is none of the files")
        if part.coder not in CODERS:
            raise ValueError(f"coder {part.coder!r}: expected one of {', '.join(CODERS)}")
        if part.coded_offset != at or part.coded_bytes < 0 or part.nbytes < 0 or part.coded_bytes > part.nbytes:
            raise ValueError(f"part {part.name!r} of {part.file} does not follow the one before")
        if part.stage < last_stage:
            raise ValueError(f"part {part.name!r} of {part.file} is of an earlier stage than the one before")
        at, last_stage = at + part.coded_bytes, part.stage
        covered[part.file].append((part.offset, part.offset + part.nbytes))
    for name, size in manifest.files.items():
        path = pathlib.PurePosixPath(name)
        if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name or "\0" in name:
            raise ValueError(f"the path {name!r} leads out of the folder")
        end = 0
        for begin, stop in sorted(covered[name]):
            if begin != end:
                raise ValueError(f"the parts of {name} overlap or leave a gap at byte {min(begin, end)}")
            end = stop
        if end != size:
            raise ValueError(f"the parts of {name} end at byte {end} of {size}")
