"""Rows of clients on disk: what comes back after a kill at any point is exactly what the restored checkpoint knew."""

import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fmfl_jax.experiment.loop.client_store import ClientStore

NUM_CLIENTS = 11


def init_client(client_id):
    """Leaves of several types; the first rows of clients differ."""
    number = client_id.astype(jnp.float32)
    return {
        "own": {"w": jnp.full((2, 3), 0.5, jnp.float32) * number, "h": jnp.full(3, number, jnp.bfloat16)},
        "last": (client_id, jnp.zeros(2, bool), jnp.zeros((0, 4), jnp.float32)),
    }


def first_rows(ids):
    ids = np.asarray(ids, np.int32)
    return {
        "own": {
            "w": np.broadcast_to(0.5 * ids[:, None, None], (len(ids), 2, 3)).astype(np.float32),
            "h": np.broadcast_to(ids[:, None], (len(ids), 3)).astype(ml_dtypes.bfloat16),
        },
        "last": (ids, np.zeros((len(ids), 2), bool), np.zeros((len(ids), 0, 4), np.float32)),
    }


def random_rows(ids, rng):
    n = len(ids)
    return {
        "own": {
            "w": rng.normal(size=(n, 2, 3)).astype(np.float32),
            "h": rng.normal(size=(n, 3)).astype(ml_dtypes.bfloat16),
        },
        "last": (rng.integers(0, 99, n).astype(np.int32), rng.random((n, 2)) < 0.5, np.zeros((n, 0, 4), np.float32)),
    }


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def put(rows, ids, new):
    """A copy of the rows [NUM_CLIENTS, ...] with some of them replaced."""

    def one(x, y):
        x = x.copy()
        x[ids] = y
        return x

    return jax.tree.map(one, rows, new)


ALL = np.arange(NUM_CLIENTS)


def test_rows_start_as_init_makes_them_and_keep_what_is_scattered(tmp_path):
    store, rng = ClientStore.open(tmp_path, NUM_CLIENTS, init_client, step=0), np.random.default_rng(0)
    ids = np.asarray([7, 0, 3])
    assert_same(store.gather(ALL), first_rows(ALL))
    new = random_rows(ids, rng)
    store.scatter(ids, new)
    assert_same(store.gather(ALL), put(first_rows(ALL), ids, new))
    assert_same(store.gather([3, 3, 10, 0]), jax.tree.map(lambda x: x[[3, 3, 10, 0]], put(first_rows(ALL), ids, new)))
    store.scatter([], random_rows([], rng))
    assert_same(store.gather([]), first_rows([]))


def test_a_kill_at_any_point_brings_back_the_rows_of_the_checkpoint(tmp_path):
    """The folder is copied after every call, as a kill would leave it, between a commit and its checkpoint too."""
    rng, folder = np.random.default_rng(1), tmp_path / "run"
    kills = []  # (copy of the folder, {step: rows} of the checkpoints on disk at that moment)
    checkpoints = {0: first_rows(ALL)}

    def kill():
        copy = tmp_path / f"kill-{len(kills)}"
        shutil.copytree(folder, copy)
        kills.append((copy, dict(checkpoints)))

    store, rows = ClientStore.open(folder, NUM_CLIENTS, init_client, step=0), first_rows(ALL)
    for step in range(1, 9):
        ids = rng.permutation(NUM_CLIENTS)[:3]
        new = random_rows(ids, rng)
        store.scatter(ids, new)
        rows = put(rows, ids, new)
        kill()
        if step % 2 == 0:
            before = max(checkpoints)
            store.commit(step)
            kill()
            checkpoints = {before: checkpoints[before], step: rows}  # orbax keeps two
            kill()
    assert len(kills) == 16
    for copy, known in kills:
        step = max(known)
        for _ in range(2):  # what is scattered and never committed is forgotten
            store = ClientStore.open(copy, NUM_CLIENTS, init_client, step=step)
            assert_same(store.gather(ALL), known[step])
            store.scatter([2, 5], random_rows([2, 5], rng))
            store.close()


def test_a_killed_process_leaves_the_rows_of_its_checkpoint(tmp_path):
    """A real SIGKILL in the middle of many writes."""
    program = f"""
import jax.numpy as jnp, numpy as np
from fmfl_jax.experiment.loop.client_store import ClientStore
store = ClientStore.open({str(tmp_path)!r}, 50, lambda i: jnp.zeros(2**15, jnp.float32), step=0)
store.scatter(np.arange(50), np.full((50, 2**15), 3, np.float32))
store.commit(4)
print("committed", flush=True)
while True:
    store.scatter(np.arange(50), np.random.normal(size=(50, 2**15)).astype(np.float32))
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "committed\n"
        time.sleep(0.3)
        process.kill()
    store = ClientStore.open(tmp_path, 50, lambda i: jnp.zeros(2**15, jnp.float32), step=4)
    assert (store.gather(np.arange(50)) == 3).all()


def test_step_0_forgets_everything(tmp_path):
    store = ClientStore.open(tmp_path, NUM_CLIENTS, init_client, step=0)
    store.scatter(ALL, random_rows(ALL, np.random.default_rng(3)))
    store.commit(1)
    store.close()
    assert_same(ClientStore.open(tmp_path, NUM_CLIENTS, init_client, step=0).gather(ALL), first_rows(ALL))


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no clients' rows"):
        ClientStore.open(tmp_path / "none", NUM_CLIENTS, init_client, step=3)
    store = ClientStore.open(tmp_path, NUM_CLIENTS, init_client, step=0)
    for step in (2, 4, 6):
        store.scatter([1], random_rows([1], np.random.default_rng(step)))
        store.commit(step)
    store.close()
    with pytest.raises(ValueError, match="go back to step 4, not to 2"):
        ClientStore.open(tmp_path, NUM_CLIENTS, init_client, step=2)
    with pytest.raises(ValueError, match="12 clients"):
        ClientStore.open(tmp_path, NUM_CLIENTS + 1, init_client, step=6)
    store = ClientStore.open(tmp_path, NUM_CLIENTS, init_client, step=6)
    with pytest.raises(ValueError, match="expected 0 ... 10"):
        store.gather([11])
    with pytest.raises(ValueError, match=r"own/h: expected bfloat16 \(1, 3\)"):
        wrong = random_rows([1], np.random.default_rng(0))
        store.scatter([1], wrong | {"own": wrong["own"] | {"h": np.zeros((1, 3), np.float32)}})


def test_thousands_of_clients_cost_no_memory_and_no_disk_until_they_are_written(tmp_path):
    """10,000 rows of 1 MB are 10 GB; three of them are written."""
    store = ClientStore.open(tmp_path, 10_000, lambda i: jnp.zeros(2**18, jnp.float32), step=0)
    store.scatter([17, 9_999, 4], np.ones((3, 2**18), np.float32))
    assert (store.gather([9_999, 5]).sum(axis=1) == [2**18, 0]).all()
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) < 8 * 2**20
