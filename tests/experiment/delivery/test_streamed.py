"""A forward pass while the model arrives: layer by layer, and the same next token."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fmfl_jax.config import llama_preset
from fmfl_jax.experiment.delivery.sources import sources
from fmfl_jax.experiment.delivery.streamed import Arrivals, next_token
from fmfl_jax.models.formats.checkpoint import load_checkpoint, save_checkpoint
from fmfl_jax.models.params import init_params
from fmfl_jax.peft.split import NoPeftConfig, split
from fmfl_jax.transport.weights.container import Container, pack
from fmfl_jax.transport.weights.receive import Receiver, part_folder

CONFIG = llama_preset("tiny")
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture(scope="module")
def container(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    params = init_params(CONFIG, jax.random.key(3))
    save_checkpoint(folder / "m", CONFIG, {n: x + 0.05 * jnp.ones((), x.dtype) for n, x in params.items()})
    pack(sources(folder / "m"), folder / "m.fmw", KEY, name="tiny", chunk_bytes=2**16)
    return Container(folder / "m.fmw", KEY.public_key())


def expected_text(folder, prompt):
    model = split(CONFIG, dict(load_checkpoint(folder).params), NoPeftConfig(), key=jax.random.key(0))
    tokens = jnp.asarray([list(prompt.encode())])
    token = int(jnp.argmax(model.merge(model.trainable, model.frozen)(tokens)[0, -1]))
    return bytes([token]).decode("utf-8", "replace")


def test_the_same_token_before_the_last_bytes_were_asked_for(container, tmp_path):
    arrivals, begun = Arrivals(in_use=True), threading.Event()
    manifest, found = container.manifest, []
    coded = container.coded(0, manifest.coded_bytes)
    wait = arrivals.wait

    def waiting(stage):
        if stage == 2:
            begun.set()  # layer 0 was computed
        wait(stage)

    arrivals.wait = waiting
    folder = tmp_path / "m"
    compute = lambda: found.append(next_token(part_folder(folder), "abc", arrivals))
    thread = threading.Thread(target=compute, daemon=True)
    receiver = Receiver(container.head, KEY.public_key(), folder, on_part=arrivals.on_part)
    thread.start()
    end = next(part.coded_offset for part in manifest.parts if part.stage == 2)
    cut = -(-end // manifest.chunk_bytes) * manifest.chunk_bytes
    assert cut < len(coded)
    receiver.write(0, coded[:cut])
    assert begun.wait(60), "layer 0 waits for bytes that it does not need"
    releasing = threading.Timer(0.0, lambda: (thread.join(), arrivals.release()))
    releasing.start()
    receiver.write(cut, coded[cut:])
    releasing.join()
    receiver.finish()
    assert found[0].text == expected_text(folder, "abc")
    assert sorted(arrivals.seconds) == [0, 1, 2, 3]
    assert 0 < found[0].begin_s < arrivals.seconds[2] < found[0].end_s


def test_what_does_not_arrive_is_an_error(container, tmp_path):
    arrivals = Arrivals(in_use=False)
    timer = threading.Timer(0.05, arrivals.fail)
    timer.start()
    with pytest.raises(ConnectionError, match="stage 0 of the model did not arrive"):
        next_token(tmp_path / "m", "abc", arrivals)
    assert np.all([s >= 0 for s in arrivals.seconds.values()])
