"""Epochs of unequal clients: every row once, by (seed, round, client) alone."""

import numpy as np

from fmfl_jax.data.shards import epoch_batches, max_steps, shards_of

SIZES = [3, 10, 1, 4, 7, 0]


def setting():
    return shards_of(np.split(np.random.default_rng(0).permutation(sum(SIZES)), np.cumsum(SIZES)[:-1]))


def batches(ids, *, round=5, seed=2, batch_size=4, epochs=2):
    shards = setting()
    return epoch_batches(
        shards,
        np.asarray(ids),
        round=round,
        seed=seed,
        batch_size=batch_size,
        epochs=epochs,
        num_steps=max_steps(shards, batch_size=batch_size, epochs=epochs),
    )


def test_every_epoch_has_every_row_of_the_client_once():
    shards, ids = setting(), [4, 0, 1, 5, 2]
    told, steps = batches(ids)
    assert told["index"].shape == (5, 6, 4) and told["mask"].shape == (5, 6, 4)
    assert steps.tolist() == [4, 2, 6, 0, 2]  # two epochs of ceil(n / 4)
    for c, client in enumerate(ids):
        own = shards.rows[shards.starts[client] : shards.starts[client + 1]]
        for epoch in np.split(np.arange(steps[c]), 2):
            counts = told["mask"][c, epoch].sum(axis=1)
            assert np.all(counts[:-1] == 4)  # only the last batch is smaller
            assert np.array_equal(np.sort(told["index"][c, epoch][told["mask"][c, epoch]]), np.sort(own))
        assert not told["mask"][c, steps[c] :].any() and not told["index"][c, steps[c] :].any()


def test_a_clients_batches_do_not_depend_on_the_others():
    together, _ = batches([1, 4, 0])
    alone, _ = batches([4])
    assert np.array_equal(together["index"][1], alone["index"][0])


def test_orders_differ_by_round_seed_and_epoch_and_are_fair():
    first = batches([1])[0]["index"][0]
    assert not np.array_equal(first[:3], first[3:])
    assert not np.array_equal(first, batches([1], round=6)[0]["index"][0])
    assert not np.array_equal(first, batches([1], seed=3)[0]["index"][0])
    # Each of 10 rows comes first in a tenth of the rounds: binomial, 5 sigma.
    firsts = [batches([1], round=r, batch_size=10, epochs=1)[0]["index"][0, 0, 0] for r in range(2000)]
    counts = np.bincount(firsts, minlength=sum(SIZES))[setting().rows[3:13]]
    assert counts.sum() == 2000 and np.all(np.abs(counts - 200) < 5 * np.sqrt(2000 * 0.1 * 0.9))
