"""The tree against its recursive definition and a golden root."""

import hashlib

from fmfl_jax.transport.weights.hash_tree import leaf, root


def defined(leaves):
    """RFC 9162, section 2.1.1, word by word."""
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + defined(leaves[:k]) + defined(leaves[k:])).digest()


def test_roots():
    leaves = [leaf(f"layer{i}".encode()) for i in range(70)]
    assert root(leaves[:5]).hex() == "76ec05faf64b8090184d8ffca442893edf2393f22c886c8dd3358da054efc4d0"
    assert root([]) == hashlib.sha256(b"").digest()
    roots = [root(leaves[:n]) for n in range(1, 70)]
    assert roots == [defined(leaves[:n]) for n in range(1, 70)]
    assert len(set(roots)) == 69


def test_what_makes_collisions_elsewhere():
    a, b, c = leaf(b"a"), leaf(b"b"), leaf(b"c")
    assert root([a, b, c]) != root([a, b, c, c])
    assert leaf(a + b) != root([a, b])
