"""Test-wide settings: strict dtypes and ranks, 8 fake CPU devices, and the optional folder of real data."""

import collections
import gc
import os
import pathlib

# Compiling takes most of the tests' time, and without LLVM's optimizations a third less. XLA_FLAGS has the last word:
# XLA_FLAGS=--xla_backend_optimization_level=3 tests the programs that users get, as a few tests always do.
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests and the commands that they start compile the same programs again and again: keep all, for the next run too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# A lowered program names the line of each operation, with all the lines that called it: under pytest some fifty.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes a million small objects that live on in caches, and Python's collector walks them over and over.
gc.set_threshold(50_000, 20, 20)


SLOW = frozenset((pathlib.Path(__file__).parent / "slow.txt").read_text(encoding="utf-8").splitlines())


def pytest_collection_modifyitems(items):
    """Marks what slow.txt lists: files, tests, or tests with one of their parameters.

    Files with the most of them come first (one counts as twenty others, as its CPU time does): of two workers none is
    left alone with a long file at the end.
    """
    cost_of = collections.Counter()
    for item in items:
        file, _, name = item.nodeid.partition("::")
        slow = not {file, f"{file}::{name.partition('[')[0]}", item.nodeid}.isdisjoint(SLOW)
        if slow:
            item.add_marker(pytest.mark.slow)
        cost_of[item.path] += 20 if slow else 1
    items.sort(key=lambda item: -cost_of[item.path])


def pytest_collection_finish():
    """What was imported stays: the collector need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def only_devices(monkeypatch):
    """only_devices(n): no more of the 8. A step that is driven from Python is compiled for each."""

    def only(count):
        first = jax.devices()[:count]
        monkeypatch.setattr(jax, "devices", lambda: first)
        for name in ("device_count", "local_device_count"):
            monkeypatch.setattr(jax, name, lambda: count)

    return only


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real text and checkpoints (FMFL_DATA); tests that need it are skipped, visibly, without it."""
    path = os.environ.get("FMFL_DATA")
    if not path:
        pytest.skip("set FMFL_DATA to the folder with wikitext2/ and ckpt/ to run this")
    path = pathlib.Path(path)
    assert (path / "ckpt").is_dir(), f"FMFL_DATA={path} has no folder ckpt/"
    return path
