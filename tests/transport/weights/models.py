"""A small model of three files to be delivered, and its publisher's key."""

import ml_dtypes
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fmfl_jax.transport.weights.container import Source, pack

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key()


def files_of(seed=0, change=0.0):
    """{file: bytes}: a header and two layers in one file, an embedding in another, a text. change: of the weights."""
    rng = np.random.default_rng(seed)
    tensors = [rng.normal(size=(256, 384)).astype(np.float32) * 0.02 for _ in range(3)]
    tensors = [(t + change * rng.normal(size=t.shape)).astype(ml_dtypes.bfloat16) for t in tensors]
    head = b"header".ljust(64)
    return {
        "layers.bin": head + tensors[0].tobytes() + tensors[1].tobytes(),
        "more/embed.bin": tensors[2].tobytes(),
        "words.txt": b"once upon a time " * 300,
    }


def sources_of(files):
    """In no particular order, so that the stages decide."""
    read = lambda file, begin, size: lambda: files[file][begin : begin + size]
    size, shape = 256 * 384 * 2, (256, 384)
    rows = [
        ("layers.1.w", "BF16", shape, 2, "layers.bin", 64 + size, size),
        ("layers.0.w", "BF16", shape, 1, "layers.bin", 64, size),
        ("", "", (), 0, "layers.bin", 0, 64),
        ("embed", "BF16", shape, 0, "more/embed.bin", 0, size),
        ("", "", (), 0, "words.txt", 0, len(files["words.txt"])),
    ]
    return [Source(*row, read(row[4], *row[5:])) for row in rows]


def packed(path, files, **options):
    """The container's path."""
    pack(sources_of(files), path, KEY, **({"name": "small", "chunk_bytes": 2**16} | options))
    return path


def contents(folder):
    """{file: bytes} of a folder, without what the receiver keeps."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if not name.startswith("container.")}
