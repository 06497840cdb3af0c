"""Receiving a container piece by piece, in any number of attempts: chunks are verified as they come, parts decoded.

Everything lies in a folder FOLDER.part, which becomes FOLDER in one step when the last part is there; what a stopped
process left is verified anew, so no list of chunks can disagree with the bytes.
"""

import fcntl
import os
import pathlib
import shutil
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fmfl_jax.transport.weights import hash_tree
from fmfl_jax.transport.weights.container import Base, check_base, decode_part, verify_chunk
from fmfl_jax.transport.weights.manifest import Manifest, Part, opened

HEAD_NAME = "container.head"
_CHUNKS_NAME, _LOCK_NAME = "container.chunks", "container.lock"
OnPart = Callable[[Manifest, Part], None]
"""Called when a part of the container is decoded and in its file, in order."""


def part_folder(folder: str | pathlib.Path) -> pathlib.Path:
    """Where what arrives for `folder` lies until all of it is there."""
    folder = pathlib.Path(folder)
    return folder.with_name(folder.name + ".part")


class Receiver:
    """Chunks into FOLDER.part/container.chunks, parts into files beside it.

    manifest: of the container. verified: bool of each chunk. resumed_bytes: what an earlier attempt left, the bytes
    of a chunk that was under way included.
    """

    def __init__(
        self,
        head: bytes,
        key: Ed25519PublicKey,
        folder: str | pathlib.Path,
        *,
        base: Base | None = None,
        on_part: OnPart | None = None,
    ):
        """head: of the container. on_part: called for parts of earlier attempts too.

        Raises:
          FileExistsError: the folder is there already, or another process receives into it.
          ValueError: a head that is not the publisher's, another base than the deltas'.
        """
        self.manifest = opened(head, key)
        check_base(self.manifest, base)
        if not {HEAD_NAME, _CHUNKS_NAME, _LOCK_NAME}.isdisjoint(self.manifest.files):
            raise ValueError(f"a container of files named like its own parts: {', '.join(self.manifest.files)}")
        self.folder = pathlib.Path(folder)
        if self.folder.exists():
            raise FileExistsError(f"{folder} is there already: name another folder, or remove it")
        self._work = part_folder(folder)
        self._work.mkdir(parents=True, exist_ok=True)
        self._lock = (self._work / _LOCK_NAME).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"{self._work}: another process receives into it") from None
        self._base, self._on_part, self._next_part = base, on_part, 0
        self._same_container(head)
        self._file = open(self._work / _CHUNKS_NAME, "r+b", buffering=0)
        self.verified = [False] * len(self.manifest.chunks)
        self._begun: dict[int, bytearray] = {}  # the front of chunks that are under way
        self._read_back()
        self.resumed_bytes = sum(end - begin for begin, end in map(self.manifest.chunk_range, self._done()))
        self.resumed_bytes += sum(map(len, self._begun.values()))
        self._decode_more()

    def wanted(self) -> list[tuple[int, int]]:
        """The coded bytes still to come, as ranges in order."""
        ranges: list[tuple[int, int]] = []
        for chunk, there in enumerate(self.verified):
            if there:
                continue
            begin, end = self.manifest.chunk_range(chunk)
            begin += len(self._begun.get(chunk, b""))
            if ranges and ranges[-1][1] == begin:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((begin, end))
        return ranges

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Coded bytes from `offset` on, which is the beginning of a wanted range or where the last write ended.

          Raises:
            DamagedChunkError: a chunk is complete and damaged; it is wanted again then, as a whole.
        ValueError: a part does not decode.
        """
        data = memoryview(data)
        while len(data):
            chunk = offset // self.manifest.chunk_bytes
            begin, end = self.manifest.chunk_range(chunk)
            front = self._begun.setdefault(chunk, bytearray())
            if self.verified[chunk] or offset != begin + len(front):
                raise ValueError(f"bytes from {offset} on are not what chunk {chunk} goes on with")
            piece = data[: end - offset]
            self._file.seek(offset)
            self._file.write(piece)
            front += piece
            offset, data = offset + len(piece), data[len(piece) :]
            if offset == end:
                del self._begun[chunk]
                verify_chunk(self.manifest, chunk, front)
                self.verified[chunk] = True
                self._decode_more()

    def finish(self) -> None:
        """Makes FOLDER of what was received. Raises ValueError if something is missing."""
        if self._next_part < len(self.manifest.parts) or not all(self.verified):
            raise ValueError(f"{self.verified.count(False)} of {len(self.verified)} chunks are missing")
        for name in self.manifest.files:
            with open(self._decoded(name), "r+b") as file:
                os.fsync(file.fileno())
        self._file.close()
        (self._work / _CHUNKS_NAME).unlink()
        (self._work / _LOCK_NAME).unlink()
        self._work.replace(self.folder)
        self._lock.close()

    def close(self) -> None:
        """Leaves what was received for the next attempt."""
        self._file.close()
        self._lock.close()

    def _same_container(self, head: bytes) -> None:
        """Starts anew where an earlier attempt was for another container."""
        path = self._work / HEAD_NAME
        if not path.is_file() or path.read_bytes() != head:
            for old in self._work.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
                elif old.name != _LOCK_NAME:
                    old.unlink()
            path.write_bytes(head)
        (self._work / _CHUNKS_NAME).touch()
        for name, size in self.manifest.files.items():
            self._decoded(name).parent.mkdir(parents=True, exist_ok=True)
            with open(self._decoded(name), "ab") as file:
                file.truncate(size)

    def _read_back(self) -> None:
        size = (self._work / _CHUNKS_NAME).stat().st_size
        for chunk in range(len(self.verified)):
            begin, end = self.manifest.chunk_range(chunk)
            if begin >= size:
                break
            self._file.seek(begin)
            data = self._file.read(end - begin)
            if end > size:
                self._begun[chunk] = bytearray(data)
            else:
                self.verified[chunk] = hash_tree.leaf(data).hex() == self.manifest.chunks[chunk]

    def _done(self) -> list[int]:
        return [chunk for chunk, there in enumerate(self.verified) if there]

    def _decoded(self, name: str) -> pathlib.Path:
        return self._work / name

    def _decode_more(self) -> None:
        """Decodes the parts whose last chunk has come, in order."""
        manifest = self.manifest
        while self._next_part < len(manifest.parts):
            part = manifest.parts[self._next_part]
            begin, end = part.coded_offset, part.coded_offset + part.coded_bytes
            chunks = range(begin // manifest.chunk_bytes, -(-end // manifest.chunk_bytes)) if end > begin else range(0)
            if not all(self.verified[chunk] for chunk in chunks):
                return
            self._file.seek(begin)
            data = decode_part(part, self._file.read(end - begin), self._base)
            with open(self._decoded(part.file), "r+b") as file:
                file.seek(part.offset)
                file.write(data)
            self._next_part += 1
            if self._on_part is not None:
                self._on_part(manifest, part)


class Unpacked:
    """A folder that a `Receiver` left; its head is verified when it is opened, a part when it is read.

    Raises:
      FileNotFoundError, ValueError: no such folder; a wrong signature.
    """

    def __init__(self, folder: str | pathlib.Path, key: Ed25519PublicKey):
        self.folder = pathlib.Path(folder)
        head = self.folder / HEAD_NAME
        if not head.is_file():
            raise FileNotFoundError(f"{head}: no such file: {folder} was not fetched by launch.deliver")
        self.manifest: Manifest = opened(head.read_bytes(), key)

    def decoded(self, part: Part) -> bytes:
        """A part's bytes. ValueError if the file was changed since."""
        with open(self.folder / part.file, "rb") as file:
            file.seek(part.offset)
            data = file.read(part.nbytes)
        if hash_tree.leaf(data).hex() != part.content:
            raise ValueError(f"{self.folder / part.file} was changed: {part.name or 'a part'} is not what was received")
        return data
