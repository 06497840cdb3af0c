"""launch.deliver as a user types it: packed, inspected, served to a real client, a delta after it, and mistakes."""

import re

import jax
import jax.numpy as jnp
import pytest

from fmfl_jax.config import llama_preset
from fmfl_jax.models.formats.checkpoint import save_checkpoint
from fmfl_jax.models.params import init_params
from tests import commands

DELIVER = "launch.deliver"
CONFIG = llama_preset("tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds a model, a tuned one, the container of the first and its key."""
    folder = tmp_path_factory.mktemp("deliver")
    params = init_params(CONFIG, jax.random.key(0), dtype="bfloat16")
    save_checkpoint(folder / "model", CONFIG, params)
    tuned = {name: (x + 1e-5 * jnp.ones((), x.dtype)).astype(x.dtype) for name, x in params.items()}
    save_checkpoint(folder / "tuned", CONFIG, tuned)
    done = pack(folder, "--checkpoint", folder / "model", "--out", folder / "m.fmw")
    assert done.status == 0, done.err
    assert re.search(r"^model, version 1: [\d,]+ bytes in \d files, coded [\d,]+ \(0\.\d+\)", done.out)
    return folder


def pack(folder, *flags):
    return commands.run(DELIVER, "pack", "--key", folder / "key.pem", *flags)


def files(path):
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name != "container.head"}


def test_inspect_and_a_delta(folder, tmp_path):
    key = ("--public_key", folder / "key.pem.pub")
    done = commands.run(DELIVER, "inspect", "--container", folder / "m.fmw", *key)
    assert done.status == 0 and "all 1 chunks are whole" in done.out, done.err
    assert re.search(r"^floats  BF16 +\d+ +[\d,]+ +[\d,]+ +0\.6\d\d$", done.out, re.MULTILINE)
    out = tmp_path / "d.fmw"
    done = pack(folder, "--checkpoint", folder / "tuned", "--out", out, "--base", folder / "m.fmw")
    assert done.status == 0 and out.stat().st_size < 0.5 * (folder / "m.fmw").stat().st_size, done.err
    done = commands.run(DELIVER, "inspect", "--container", out, *key)
    assert "deltas against content" in done.out and re.search(r"^delta   BF16", done.out, re.MULTILINE)


def test_served_and_fetched(folder, tmp_path):
    key = ("--public_key", folder / "key.pem.pub")
    server = commands.start(DELIVER, "serve", "--container", folder / "m.fmw", *key, "--port", 0)
    try:
        url = server.line(r"served at (\S+) until")
        done = commands.run(DELIVER, "fetch", "--url", url, *key, "--out", tmp_path / "got", "--prompt", "The ")
        assert done.status == 0, done.err
        assert re.search(r"^layer 0 began after [\d.]+ s; after [\d.]+ s: The .", done.out, re.MULTILINE)
        assert files(tmp_path / "got") == files(folder / "model")
        again = commands.run(DELIVER, "fetch", "--url", url, *key, "--out", tmp_path / "got")
        assert (again.status, again.err.count("\n")) == (2, 1) and "is there already" in again.err
        other = commands.run(DELIVER, "fetch", "--url", url, "--public_key", "11" * 32, "--out", tmp_path / "x")
        assert (other.status, other.err) == (
            2,
            "error: wrong signature: the manifest was changed, or signed with another key\n",
        )
        assert [p.name for p in tmp_path.iterdir()] == ["got"]
    finally:
        server.interrupt()
    assert server.wait().out.endswith("stopped\n")


@pytest.mark.parametrize(
    "flags, why",
    [
        ((), "expected one of pack, serve, fetch, inspect before the options"),
        (("eat",), "expected one of pack"),
        (("pack", "more"), "unexpected argument 'more'"),
        (("fetch",), "--url is needed: where the container is served."),
        (("fetch", "--url=http://127.0.0.1:9/", "--out=x", "--public_key=00"), "--public_key=00: expected"),
        (("inspect", "--container=setup.cfg", f"--public_key={'11' * 32}"), "not a container of weights"),
    ],
)
def test_mistakes_are_one_line(flags, why):
    done = commands.run(DELIVER, *flags)
    assert done.status == 2 and why in done.err and done.err.count("\n") == 1, done.err
