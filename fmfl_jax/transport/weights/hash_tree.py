"""SHA-256 over a list of chunks as a binary tree: RFC 9162 (Certificate Transparency 2.0), section 2.1.1.

    leaf(d) = SHA-256(00 d)      node(l, r) = SHA-256(01 l r)

The list is split at the largest power of two below its length. What stands in front keeps leaves and nodes apart, and
no leaf is doubled to fill a level (where it is, two lists share a root: CVE-2012-2459).
"""

import hashlib
from collections.abc import Sequence

Octets = bytes | bytearray | memoryview


def leaf(data: Octets) -> bytes:
    """The hash of a chunk, 32 bytes."""
    digest = hashlib.sha256(b"\x00")
    digest.update(data)
    return digest.digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """The hash of a list of `leaf` hashes, 32 bytes; of none, SHA-256 of nothing."""
    if not leaves:
        return hashlib.sha256().digest()
    # Complete subtrees from the left, the sizes falling powers of two, are joined as soon as two are of one size.
    subtrees: list[tuple[int, bytes]] = []
    for hashed in leaves:
        subtrees.append((1, hashed))
        while len(subtrees) > 1 and subtrees[-2][0] == subtrees[-1][0]:
            _join_last(subtrees)
    while len(subtrees) > 1:
        _join_last(subtrees)
    return subtrees[0][1]


def _join_last(subtrees: list[tuple[int, bytes]]) -> None:
    (more, left), (fewer, right) = subtrees[-2:]
    subtrees[-2:] = [(more + fewer, hashlib.sha256(b"\x01" + left + right).digest())]
