"""A node without the server's base, or with another one, gets it from a container over HTTP and joins; a node that has
it gets nothing."""

import contextlib
import pathlib
import threading

import jax
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fmfl_jax.deploy.base import delivered_base
from fmfl_jax.deploy.client import Node
from fmfl_jax.deploy.fleet import Expected, Fleet
from fmfl_jax.deploy.job import language_model_side
from fmfl_jax.experiment.config.data import TextConfig
from fmfl_jax.experiment.delivery.sources import sources
from fmfl_jax.models.formats.checkpoint import save_checkpoint
from fmfl_jax.models.params import init_params
from fmfl_jax.transport.weights.container import Container, content_of, pack
from fmfl_jax.transport.weights.http import make_server
from tests.deploy.links import SETTINGS, Direct
from tests.experiment.toys import MODEL, llama_settings

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture(autouse=True)
def one_device(only_devices):
    only_devices(1)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with the server's base, another one and the container of the first."""
    folder = tmp_path_factory.mktemp("published")
    for seed, name in enumerate(("base", "other")):
        save_checkpoint(folder / name, MODEL, init_params(MODEL, jax.random.key(seed)))
    pack(sources(folder / "base"), folder / "base.fmw", KEY, name="base", chunk_bytes=2**16)
    return folder


@contextlib.contextmanager
def served(folder):
    """(address, the ranges' first bytes as they are asked for)."""
    asked = []
    container = Container(folder / "base.fmw", KEY.public_key())
    server = make_server(container, "127.0.0.1", 0, on_request=asked.append)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def side_on(checkpoint, folder):
    """A client side with this checkpoint."""
    config = llama_settings(checkpoint=checkpoint, tokenizer="bytes", model=None, text=TextConfig(seq_len=32))
    return language_model_side(config, SETTINGS, folder, lambda line: None)


def greeting(side, expected, folder):
    """What the server says to a node with the first client."""
    lines = []
    fleet = Fleet(Direct({1: Node(side, [0], folder)}), Expected(SETTINGS, expected), timeout_s=5, say=lines.append)
    fleet.greet()
    return lines


@pytest.mark.parametrize("here", [None, "other", "damaged", "gone"])
def test_a_node_with_no_base_or_another_gets_the_servers_and_joins(here, published, tmp_path):
    path = None if here is None else tmp_path / "damaged" if here == "damaged" else published / here
    if here == "damaged":
        (tmp_path / "damaged").mkdir()
        (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\xff" * 100)
    lines, head = [], len(Container(published / "base.fmw", KEY.public_key()).head)
    with served(published) as (url, asked):
        got = delivered_base(url, KEY.public_key(), path, tmp_path / "state", lines.append)
        assert max(asked) >= head and "delivered" in lines[-1]
        assert got.is_relative_to(tmp_path / "state")
        asked.clear()  # the node is started again
        assert delivered_base(url, KEY.public_key(), path, tmp_path / "state", lines.append) == got
        assert max(asked) < head and "nothing is fetched" in lines[-1]
    assert {p.name: p.read_bytes() for p in got.iterdir() if p.name != "container.head"} == {
        p.name: p.read_bytes() for p in (published / "base").iterdir()
    }
    if here == "other":
        expected = side_on(published / "base", tmp_path).base
        theirs = side_on(published / "other", tmp_path)
        (line,) = greeting(theirs, expected, tmp_path)  # without delivery
        assert "refused" in line and expected in line and theirs.base in line
        assert greeting(side_on(got, tmp_path), expected, tmp_path) == ["a node with client 0 is here"]


def test_the_same_base_is_never_sent(published, tmp_path):
    head = len(Container(published / "base.fmw", KEY.public_key()).head)
    with served(published) as (url, asked):
        got = delivered_base(url, KEY.public_key(), published / "base", tmp_path / "state", lambda line: None)
    assert got == published / "base" and max(asked) < head and not (tmp_path / "state").exists()
    assert content_of(sources(got)) == Container(published / "base.fmw", KEY.public_key()).manifest.content


def test_a_base_of_another_publisher_or_one_changed_on_disk_is_no_base(published, tmp_path):
    stranger = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key()
    with served(published) as (url, _):
        with pytest.raises(ValueError, match="wrong signature"):
            delivered_base(url, stranger, None, tmp_path / "state", lambda line: None)
        assert not (tmp_path / "state").exists()
        got = delivered_base(url, KEY.public_key(), None, tmp_path / "state", lambda line: None)
        weights = pathlib.Path(got / "model.safetensors")
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
        with pytest.raises(FileExistsError, match="remove it"):
            delivered_base(url, KEY.public_key(), None, tmp_path / "state", lambda line: None)
