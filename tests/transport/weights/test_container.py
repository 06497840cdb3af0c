"""Containers: every file comes back, every damage is found, every manifest that makes no sense is refused."""

import dataclasses
import json

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fmfl_jax.transport.weights.container import Container, check_base, pack
from fmfl_jax.transport.weights.manifest import PREFIX_BYTES, head_bytes, opened, sealed, tree_root
from tests.transport.weights.models import KEY, PUBLIC, files_of, packed, sources_of


def unpacked(container, base=None):
    files = {name: bytearray(size) for name, size in container.manifest.files.items()}
    for part in container.manifest.parts:
        files[part.file][part.offset : part.offset + part.nbytes] = container.decoded(part, base)
    return {name: bytes(data) for name, data in files.items()}


def test_every_file_comes_back_in_the_order_of_stages(tmp_path):
    files = files_of()
    container = Container(packed(tmp_path / "m.fmw", files), PUBLIC)
    assert unpacked(container) == files
    manifest = container.manifest
    assert [p.name or p.file for p in manifest.parts] == [
        "layers.bin",
        "embed",
        "words.txt",
        "layers.0.w",
        "layers.1.w",
    ]
    assert manifest.coded_bytes < 0.72 * manifest.decoded_bytes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.fmw"]


def test_a_delta_and_its_base(tmp_path):
    base = Container(packed(tmp_path / "base.fmw", files_of()), PUBLIC)
    tuned = files_of(change=2e-5)
    delta = Container(packed(tmp_path / "delta.fmw", tuned, base=base, version=2), PUBLIC)
    assert delta.manifest.coded_bytes < 0.2 * base.manifest.coded_bytes
    assert unpacked(delta, base) == tuned
    check_base(delta.manifest, base)
    other = Container(packed(tmp_path / "other.fmw", files_of(seed=1)), PUBLIC)
    with pytest.raises(ValueError, match="a delta against another base"):
        check_base(delta.manifest, other)
    with pytest.raises(ValueError, match="name its base"):
        check_base(delta.manifest, None)
    with pytest.raises(ValueError, match="does not decode to what was packed"):
        unpacked(delta, other)
    # Another coding of the same base is the same content.
    check_base(delta.manifest, Container(packed(tmp_path / "again.fmw", files_of(), chunk_bytes=2**17), PUBLIC))


def test_every_random_damage_is_found(tmp_path):
    path = packed(tmp_path / "m.fmw", files_of())
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    head = len(Container(path, PUBLIC).head)
    for i in range(300):
        damaged = bytearray(whole)
        at = int(rng.integers(head if i % 2 else len(whole)) if i % 4 else rng.integers(PREFIX_BYTES))
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ValueError):
            container = Container(path, PUBLIC)
            container.coded(0, container.manifest.coded_bytes)
    for cut in (0, 5, PREFIX_BYTES, head - 1, head, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError):
            Container(path, PUBLIC)
    path.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="its manifest announces"):
        Container(path, PUBLIC)


def test_only_the_publisher_can_sign(tmp_path):
    path = packed(tmp_path / "m.fmw", files_of())
    other = Ed25519PrivateKey.from_private_bytes(bytes(32))
    with pytest.raises(ValueError, match="wrong signature"):
        Container(path, other.public_key())
    head = Container(path, PUBLIC).head
    again = sealed(opened(head, PUBLIC), KEY)
    assert again == head and head_bytes(head[:PREFIX_BYTES]) == len(head)
    with pytest.raises(ValueError, match="not a container"):
        head_bytes(b"GGUF".ljust(PREFIX_BYTES))
    with pytest.raises(ValueError, match="at most"):
        head_bytes(head[:8] + b"\xff\xff\xff\xff")


def changed(manifest, **fields):
    return dataclasses.replace(manifest, **fields)


def with_part(manifest, index, **fields):
    parts = list(manifest.parts)
    parts[index] = dataclasses.replace(parts[index], **fields)
    return dataclasses.replace(manifest, parts=tuple(parts))


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda m: changed(m, root="0" * 64), "wrong root"),
        (lambda m: changed(m, content="0" * 64), "wrong content"),
        (lambda m: changed(m, chunks=m.chunks[1:], root=tree_root(m.chunks[1:])), "chunks of 65536 bytes for"),
        (lambda m: changed(m, chunks=(*m.chunks[:-1], "xyz")), "64 hexadecimal"),
        (lambda m: changed(m, chunk_bytes=1000), "chunk_bytes=1000"),
        (lambda m: changed(m, base="1" * 64), "only there"),
        (lambda m: with_part(m, 0, coder="delta"), "only there"),
        (lambda m: with_part(m, 0, coder="lzma"), "coder 'lzma'"),
        (lambda m: with_part(m, 0, file="other"), "none of the files"),
        (lambda m: with_part(m, 1, coded_offset=0), "does not follow"),
        (lambda m: with_part(m, 1, coded_bytes=2**60), "does not follow"),
        (lambda m: with_part(m, 0, stage=7), "earlier stage"),
        (lambda m: with_part(m, 3, offset=63), "overlap or leave a gap at byte 63"),
        (lambda m: with_part(m, 3, offset=65), "overlap or leave a gap at byte 64"),
        (lambda m: changed(m, files=m.files | {"words.txt": 10**12}), "end at byte 5100 of 1000000000000"),
        (lambda m: changed(m, files=m.files | {"empty": 1}), "end at byte 0 of 1"),
        (lambda m: changed(m, files=m.files | {"../x": 0}), "leads out of the folder"),
        (lambda m: changed(m, files=m.files | {"/x": 0}), "leads out of the folder"),
    ],
)
def test_manifests_that_make_no_sense(tmp_path, change, why):
    manifest = Container(packed(tmp_path / "m.fmw", files_of()), PUBLIC).manifest
    with pytest.raises(ValueError, match=why):
        change(manifest)


def test_a_signed_manifest_of_other_types(tmp_path):
    head = Container(packed(tmp_path / "m.fmw", files_of()), PUBLIC).head
    found = json.loads(head[PREFIX_BYTES:-64])
    for bad in ({"version": "1"}, {"parts": 3}, {"parts": [{}]}, {"chunks": [1]}, {"files": []}, {"extra": 1}):
        text = json.dumps(found | bad).encode()
        signed = (
            head[:8] + len(text).to_bytes(4, "little") + text + KEY.sign(b"fmfl_jax container of weights 1\x00" + text)
        )
        with pytest.raises(ValueError):
            opened(signed, PUBLIC)


def test_what_fails_while_packing_leaves_nothing(tmp_path):
    sources = sources_of(files_of())
    short = [sources[0]._replace(read=lambda: b"short"), *sources[1:]]
    with pytest.raises(ValueError, match="5 bytes, announced as"):
        pack(short, tmp_path / "m.fmw", KEY, name="small")
    with pytest.raises(ValueError, match="overlap or leave a gap"):
        pack(sources[:1] + sources[2:], tmp_path / "m.fmw", KEY, name="small")
    assert not list(tmp_path.iterdir())
