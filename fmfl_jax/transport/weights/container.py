"""Packing files into a container of weights, and getting their parts back."""

import os
import pathlib
import shutil
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fmfl_jax.transport.weights import coders, hash_tree
from fmfl_jax.transport.weights.hash_tree import Octets
from fmfl_jax.transport.weights.manifest import (
    PREFIX_BYTES,
    Manifest,
    Part,
    head_bytes,
    opened,
    sealed,
    tree_root,
)


class Source(NamedTuple):
    """A part to be packed: see `Part`. read: gives its bytes, asked for when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stage: int
    file: str
    offset: int
    nbytes: int
    read: Callable[[], Octets]


class Base(Protocol):
    """A model that deltas are against."""

    manifest: Manifest

    def decoded(self, part: Part) -> Octets:
        """The bytes of a part of its own manifest."""
        ...


class Container:
    """A container in a file; its head is verified when it is opened, a part's chunks when it is read.

    Raises:
      FileNotFoundError, ValueError: no such file; no container, a wrong signature, a wrong length.
    """

    def __init__(self, path: str | pathlib.Path, key: Ed25519PublicKey):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        with self.path.open("rb") as file:
            prefix = file.read(PREFIX_BYTES)
            self.head = prefix + file.read(head_bytes(prefix) - PREFIX_BYTES)
        self.manifest = opened(self.head, key)
        size, expected = self.path.stat().st_size, len(self.head) + self.manifest.coded_bytes
        if size != expected:
            raise ValueError(f"{path}: {size} bytes, its manifest announces {expected}")

    def coded(self, begin: int, end: int) -> bytes:
        """Coded bytes, of chunks that are verified."""
        chunk_bytes = self.manifest.chunk_bytes
        first, stop = begin // chunk_bytes, -(-end // chunk_bytes)
        with self.path.open("rb") as file:
            file.seek(len(self.head) + first * chunk_bytes)
            data = file.read(min(stop * chunk_bytes, self.manifest.coded_bytes) - first * chunk_bytes)
        for chunk in range(first, stop):
            at = (chunk - first) * chunk_bytes
            verify_chunk(self.manifest, chunk, memoryview(data)[at : at + chunk_bytes])
        return data[begin - first * chunk_bytes : end - first * chunk_bytes]

    def decoded(self, part: Part, base: Base | None = None) -> Octets:
        """A part's bytes. base: of a delta, verified by `check_base`."""
        coded = self.coded(part.coded_offset, part.coded_offset + part.coded_bytes)
        return decode_part(part, coded, base)


class DamagedChunkError(ValueError):
    """The bytes of a chunk are not those that the manifest has the hash of."""


def verify_chunk(manifest: Manifest, chunk: int, data: Octets) -> None:
    """Raises DamagedChunkError if these are not the chunk's bytes."""
    if hash_tree.leaf(data).hex() != manifest.chunks[chunk]:
        raise DamagedChunkError(f"chunk {chunk} of {len(manifest.chunks)} is damaged: its hash is not the manifest's")


def decode_part(part: Part, coded: Octets, base: Base | None = None) -> Octets:
    """The part's bytes, from coded bytes that were verified. base: of a delta, verified by `check_base`.

    Raises:
      ValueError: if they decode to something else than what was packed.
    """
    before = None
    if part.coder == "delta":
        if base is None:
            raise ValueError(f"{part.name} is a delta: its base is needed")
        same = same_part(base.manifest, part.name, part.dtype, part.nbytes)
        if same is None:
            raise ValueError(f"the base has no {part.name} of {part.dtype} and {part.nbytes} bytes")
        before = base.decoded(same)
    data = coders.decode(part.coder, coded, part.dtype, part.nbytes, before)
    if hash_tree.leaf(data).hex() != part.content:
        raise ValueError(f"{part.name or part.file} does not decode to what was packed")
    return data


def check_base(manifest: Manifest, base: Base | None) -> None:
    """Raises ValueError if the container has deltas and this is not the base that they are against."""
    if manifest.base is None:
        return
    if base is None:
        raise ValueError(
            f"{manifest.name} is a delta against the content {manifest.base[:16]}: name its base, base=FOLDER"
        )
    if base.manifest.content != manifest.base:
        raise ValueError(
            f"{manifest.name} is a delta against another base: content {manifest.base[:16]}, "
            f"{base.manifest.name} has {base.manifest.content[:16]}"
        )


def same_part(manifest: Manifest, name: str, dtype: str, nbytes: int) -> Part | None:
    """The tensor of this name, if it is of this dtype and size."""
    for found in manifest.parts:
        if found.name == name != "" and (found.dtype, found.nbytes) == (dtype, nbytes):
            return found
    return None


def content_of(sources: Iterable[Source]) -> str:
    """The content, as of a manifest, that a container of these parts would have: what is here is compared by it."""
    return tree_root(hash_tree.leaf(source.read()).hex() for source in sorted(sources, key=lambda s: s.stage))


def pack(
    sources: Iterable[Source],
    path: str | pathlib.Path,
    key: Ed25519PrivateKey,
    *,
    name: str,
    version: int = 1,
    chunk_bytes: int = 2**18,
    base: Base | None = None,
) -> Manifest:
    """Writes the container; one part is in memory at a time. Sources of one stage stay in their order.

    A tensor that the base has too, of the same name, dtype and size, is sent as a delta where that is smaller.

    Raises:
      ValueError: as `Manifest`.
    """
    path = pathlib.Path(path)
    files: dict[str, int] = {}
    parts: list[Part] = []
    chunks = _Chunks(chunk_bytes)
    body, unfinished = (path.with_name(path.name + end) for end in (".body", ".part"))
    try:
        with body.open("wb") as file:
            for source in sorted(sources, key=lambda s: s.stage):
                part, coded = _coded_part(source, chunks.total, base)
                parts.append(part)
                files[part.file] = files.get(part.file, 0) + part.nbytes
                chunks.add(coded)
                file.write(coded)
        hashes = tuple(chunks.finish())
        manifest = Manifest(
            name=name,
            version=version,
            files=files,
            parts=tuple(parts),
            chunk_bytes=chunk_bytes,
            chunks=hashes,
            root=tree_root(hashes),
            content=tree_root(p.content for p in parts),
            base=base.manifest.content if base and any(p.coder == "delta" for p in parts) else None,
        )
        with unfinished.open("wb") as out, body.open("rb") as file:
            out.write(sealed(manifest, key))
            shutil.copyfileobj(file, out, 2**20)
            out.flush()
            os.fsync(out.fileno())
        unfinished.replace(path)
    finally:
        body.unlink(missing_ok=True)
        unfinished.unlink(missing_ok=True)
    return manifest


class _Chunks:
    """Hashes of the chunks of bytes that come in pieces."""

    def __init__(self, chunk_bytes: int):
        self.chunk_bytes, self.total = chunk_bytes, 0
        self._hashes: list[str] = []
        self._rest = bytearray()

    def add(self, data: bytes) -> None:
        self.total += len(data)
        self._rest += data
        whole = len(self._rest) // self.chunk_bytes * self.chunk_bytes
        with memoryview(self._rest) as view:
            for at in range(0, whole, self.chunk_bytes):
                self._hashes.append(hash_tree.leaf(view[at : at + self.chunk_bytes]).hex())
        del self._rest[:whole]

    def finish(self) -> list[str]:
        if self._rest:
            self._hashes.append(hash_tree.leaf(self._rest).hex())
        return self._hashes


def _coded_part(source: Source, coded_offset: int, base: Base | None) -> tuple[Part, bytes]:
    data = source.read()
    if len(data) != source.nbytes:
        raise ValueError(f"{source.name or source.file}: {len(data)} bytes, announced as {source.nbytes}")
    before = None
    if base is not None and (same := same_part(base.manifest, source.name, source.dtype, len(data))) is not None:
        before = base.decoded(same)
    coder, coded = coders.encode(data, source.dtype, before)
    part = Part(
        **{field: getattr(source, field) for field in Source._fields if field != "read"},
        coder=coder,
        coded_offset=coded_offset,
        coded_bytes=len(coded),
        content=hash_tree.leaf(data).hex(),
    )
    return part, coded
