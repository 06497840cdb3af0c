"""Receiving: stopped anywhere, no verified chunk is asked for again, and nothing unfinished looks finished."""

import numpy as np
import pytest

from fmfl_jax.transport.weights.container import Container, DamagedChunkError
from fmfl_jax.transport.weights.fountain import Decoder, symbol
from fmfl_jax.transport.weights.receive import Receiver, Unpacked
from tests.transport.weights.models import PUBLIC, contents, files_of, packed


@pytest.fixture(scope="module")
def container(tmp_path_factory):
    return Container(packed(tmp_path_factory.mktemp("packed") / "m.fmw", files_of()), PUBLIC)


def test_stopped_at_any_byte(tmp_path, container):
    coded = container.coded(0, container.manifest.coded_bytes)
    rng, folder = np.random.default_rng(5), tmp_path / "model"
    sent = np.zeros(len(coded), int)
    for _ in range(40):
        receiver = Receiver(container.head, PUBLIC, folder)
        assert receiver.resumed_bytes == np.count_nonzero(sent)
        begin, end = receiver.wanted()[0]
        stop = min(end, begin + int(rng.integers(1, len(coded) // 40)))
        sent[begin:stop] += 1
        receiver.write(begin, coded[begin:stop])
        assert not folder.exists()
        with pytest.raises(ValueError, match="are missing"):
            receiver.finish()
        receiver.close()
    receiver = Receiver(container.head, PUBLIC, folder)
    for begin, end in receiver.wanted():
        sent[begin:end] += 1
        receiver.write(begin, coded[begin:end])
    receiver.finish()
    assert np.all(sent == 1)
    assert contents(folder) == files_of() and [p.name for p in tmp_path.iterdir()] == ["model"]
    part = container.manifest.parts[1]
    assert Unpacked(folder, PUBLIC).decoded(part) == container.decoded(part)
    with pytest.raises(FileExistsError, match="is there already"):
        Receiver(container.head, PUBLIC, folder)


def test_layers_are_there_before_the_last_byte(tmp_path, container):
    coded, seen = container.coded(0, container.manifest.coded_bytes), []
    receiver = Receiver(container.head, PUBLIC, tmp_path / "m", on_part=lambda _, part: seen.append(part.name))
    last = container.manifest.parts[-1]
    receiver.write(0, coded[: last.coded_offset + 1000])
    assert seen == ["", "embed", ""]  # the chunk in which the first layer ends has not come whole
    receiver.write(last.coded_offset + 1000, coded[last.coded_offset + 1000 : -1])
    assert seen == ["", "embed", "", "layers.0.w"]
    receiver.close()
    again = []
    receiver = Receiver(container.head, PUBLIC, tmp_path / "m", on_part=lambda _, part: again.append(part.name))
    assert again == seen and receiver.wanted() == [(len(coded) - 1, len(coded))]
    receiver.write(len(coded) - 1, coded[-1:])
    assert again[-1] == "layers.1.w"
    receiver.close()


def test_chunks_in_any_order_and_damaged_ones(tmp_path, container):
    manifest = container.manifest
    coded = container.coded(0, manifest.coded_bytes)
    receiver = Receiver(container.head, PUBLIC, tmp_path / "m")
    order = np.random.default_rng(1).permutation(len(manifest.chunks))
    for chunk in order:
        begin, end = manifest.chunk_range(int(chunk))
        damaged = bytearray(coded[begin:end])
        damaged[len(damaged) // 2] ^= 1
        with pytest.raises(DamagedChunkError, match=f"chunk {chunk} of {len(order)} is damaged"):
            receiver.write(begin, damaged)
        assert any(b <= begin and end <= e for b, e in receiver.wanted())
        receiver.write(begin, coded[begin:end])
        with pytest.raises(ValueError, match="are not what chunk"):
            receiver.write(begin, coded[begin:end])
    receiver.finish()
    assert contents(tmp_path / "m") == files_of()


def test_what_was_left_and_changed_is_asked_for_again(tmp_path, container):
    coded = container.coded(0, container.manifest.coded_bytes)
    receiver = Receiver(container.head, PUBLIC, tmp_path / "m")
    receiver.write(0, coded[:200_000])
    receiver.close()
    left = tmp_path / "m.part" / "container.chunks"
    data = bytearray(left.read_bytes())
    data[70_000] ^= 1
    left.write_bytes(data)
    receiver = Receiver(container.head, PUBLIC, tmp_path / "m")
    assert receiver.wanted() == [(65_536, 131_072), (200_000, len(coded))]
    receiver.close()


def test_another_container_starts_anew_and_a_second_process_is_refused(tmp_path, container):
    coded = container.coded(0, container.manifest.coded_bytes)
    receiver = Receiver(container.head, PUBLIC, tmp_path / "m")
    receiver.write(0, coded[:200_000])
    with pytest.raises(FileExistsError, match="another process receives"):
        Receiver(container.head, PUBLIC, tmp_path / "m")
    receiver.close()
    newer = Container(packed(tmp_path / "n.fmw", files_of(seed=2), version=2), PUBLIC)
    receiver = Receiver(newer.head, PUBLIC, tmp_path / "m")
    assert receiver.resumed_bytes == 0
    receiver.write(0, newer.coded(0, newer.manifest.coded_bytes))
    receiver.finish()
    assert contents(tmp_path / "m") == files_of(seed=2)


def test_deltas_need_their_base(tmp_path, container):
    tuned = files_of(change=2e-5)
    delta = Container(packed(tmp_path / "d.fmw", tuned, base=container), PUBLIC)
    with pytest.raises(ValueError, match="name its base"):
        Receiver(delta.head, PUBLIC, tmp_path / "t")
    assert not (tmp_path / "t.part").exists()
    receiver = Receiver(container.head, PUBLIC, tmp_path / "b")
    receiver.write(0, container.coded(0, container.manifest.coded_bytes))
    receiver.finish()
    base = Unpacked(tmp_path / "b", PUBLIC)
    receiver = Receiver(delta.head, PUBLIC, tmp_path / "t", base=base)
    receiver.write(0, delta.coded(0, delta.manifest.coded_bytes))
    receiver.finish()
    assert contents(tmp_path / "t") == tuned
    file = tmp_path / "b" / "layers.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"layers.bin was changed: layers.1.w"):
        base.decoded(base.manifest.parts[-1])


def test_chunks_over_a_lossy_broadcast(tmp_path, container):
    """Each receiver loses other symbols of a fountain, and all have the model after little more than the ideal code."""
    manifest = container.manifest
    size, count = manifest.chunk_bytes, len(manifest.chunks)
    coded = container.coded(0, manifest.coded_bytes).ljust(count * size, b"\0")
    chunks = np.frombuffer(coded, np.uint8).reshape(count, size)
    rng, users, number = np.random.default_rng(3), {f"u{u}": Decoder(count, size, seed=9) for u in range(3)}, 0
    while users:
        sent = symbol(chunks, number, seed=9)
        for user, decoder in list(users.items()):
            if rng.random() >= 0.3 and decoder.add(number, sent):
                receiver = Receiver(container.head, PUBLIC, tmp_path / user)
                for chunk, data in enumerate(decoder.chunks()):
                    begin, end = manifest.chunk_range(chunk)
                    receiver.write(begin, data[: end - begin].data)
                receiver.finish()
                assert contents(tmp_path / user) == files_of()
                del users[user]
        number += 1
    assert count < number < 4 * count
