"""Robust aggregators: properties that all share, plain numpy and scipy references, published values."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.stats

from fmfl_jax.fed import attacks
from fmfl_jax.fed.aggregators import robust, robust_statistics
from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from fmfl_jax.fed.core.cohort import put_on_devices
from fmfl_jax.fed.core.execution import pmap_round
from fmfl_jax.fed.core.reduce import gathered_mean
from fmfl_jax.fed.core.round import make_round
from fmfl_jax.fed.core.types import Cohort, GatheredUpdates
from fmfl_jax.parallel import replicate

AGGREGATORS = {
    "median": robust.median(),
    "trimmed": robust.trimmed(0.2),
    "krum": robust.krum(1),
    "multi_krum": robust.multi_krum(0.2),
    "multi_krum_keep": robust.multi_krum(1, 2),
    "geometric_median": robust.geometric_median(),
    "norm_bound": robust.norm_bound(1000.0),
    "fltrust": robust.fltrust(),
}
CLIENTS = 7
REFERENCE = {"a": np.full((3, 2), 0.7, np.float32), "b": np.float32(-0.4), "c": np.full(4, 0.2, np.float32)}


@functools.cache
def compiled(name):
    """(updates, weights) -> (update, metrics), as a round does it: every update transformed, then all joined."""
    aggregator = AGGREGATORS[name]

    def run(updates, weights):
        metrics = {}
        if aggregator.transform_update is not None:
            updates, metrics = jax.vmap(aggregator.transform_update, in_axes=(0, None))(updates, ())
        gathered = GatheredUpdates(updates, weights, weights, {}, REFERENCE if aggregator.needs_reference else None)
        if aggregator.aggregate is None:
            return gathered_mean(gathered), metrics
        return aggregator.aggregate(gathered, (), jax.random.key(1))

    return jax.jit(run)


def updates_of(num_clients, seed=0):
    """Spread around the reference, so that FLTrust trusts most; a matrix, a scalar and a vector."""
    rng = np.random.default_rng(seed)
    return {
        name: (x + 0.5 * rng.normal(size=(num_clients, *x.shape))).astype(np.float32) for name, x in REFERENCE.items()
    }


def close(got, expected, tolerance=2e-6):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=10 * tolerance, atol=tolerance), got, expected)


def joined(updates):
    """float64 [C, n], leaves in the tree's order."""
    return np.concatenate([np.asarray(x, np.float64).reshape(x.shape[0], -1) for x in jax.tree.leaves(updates)], 1)


def vector(update):
    return joined(jax.tree.map(lambda x: np.asarray(x)[None], update))[0]


@pytest.mark.parametrize("name", AGGREGATORS)
def test_properties_of_all(name):
    aggregate = compiled(name)
    weights = np.asarray([3.0, 1.0, 5.0, 2.0, 2.0, 4.0, 1.0], np.float32)
    updates = updates_of(CLIENTS)
    update, _ = aggregate(updates, weights)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), update) == jax.tree.map(lambda x: (x.shape, x.dtype), REFERENCE)

    order = np.random.default_rng(1).permutation(CLIENTS)
    close(aggregate(jax.tree.map(lambda x: x[order], updates), weights[order])[0], update)
    close(aggregate(updates, 37.0 * weights)[0], update)

    # Absent clients: the same as if they had never been there, whatever stands in their rows.
    present = np.asarray([True, False, True, True, False, True, True])
    alone, _ = aggregate(jax.tree.map(lambda x: x[present], updates), weights[present])
    for garbage in (0.0, 1e30, np.nan, -np.inf):
        rows = jax.tree.map(
            lambda x: np.where(present.reshape(-1, *(1,) * (x.ndim - 1)), x, np.float32(garbage)), updates
        )
        got, metrics = aggregate(rows, np.where(present, weights, np.float32(0.0)))
        close(got, alone)
        if AGGREGATORS[name].transform_update is None:
            assert all(np.isfinite(x) for x in metrics.values())

    lengthened = lambda x: x
    if name == "fltrust":  # it sends every update at the reference's length
        size = np.linalg.norm(vector(REFERENCE))
        lengthened = lambda tree: jax.tree.map(
            lambda x: (x * size / np.linalg.norm(vector(tree))).astype(np.float32), tree
        )
    one = jax.tree.map(lambda x: x[2], updates)
    close(aggregate(updates, np.eye(CLIENTS, dtype=np.float32)[2])[0], lengthened(one))
    same = jax.tree.map(lambda x: np.broadcast_to(x[2], x.shape), updates)
    close(aggregate(same, weights)[0], lengthened(one))

    empty, metrics = aggregate(jax.tree.map(lambda x: np.full_like(x, np.nan), updates), np.zeros(CLIENTS, np.float32))
    assert all(np.all(x == 0.0) for x in jax.tree.leaves(empty))
    if AGGREGATORS[name].transform_update is None:
        assert all(np.isfinite(x) for x in metrics.values())
    assert aggregate._cache_size() == 2  # seven rows, and the five that were present: the number present is dynamic


def test_dtypes_are_kept():
    updates = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), updates_of(CLIENTS))
    update, _ = jax.jit(AGGREGATORS["multi_krum"].aggregate)(
        GatheredUpdates(updates, jnp.ones(CLIENTS), jnp.ones(CLIENTS), {}), (), None
    )
    assert {x.dtype for x in jax.tree.leaves(update)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("num_present", range(1, CLIENTS + 1))
def test_median_and_trimmed_mean_against_scipy(num_present):
    updates = updates_of(CLIENTS, seed=num_present)
    weights = (np.arange(CLIENTS) < num_present).astype(np.float32)
    rows = joined(updates)[:num_present]
    close(vector(compiled("median")(updates, weights)[0]), np.median(rows, axis=0))
    trimmed = min(math.floor(num_present / 5 + 0.5), (num_present - 1) // 2)  # the nearest to a fifth, fewer than half
    close(
        vector(compiled("trimmed")(updates, weights)[0]),
        scipy.stats.trim_mean(rows, trimmed / num_present + 1e-9, axis=0),
    )


def test_the_trimmed_number_is_exact():
    counts = robust._portion(0.29, 100)  # 0.29 * 50 is 14.4999... in floating point, and halves go up
    assert [int(counts[p]) for p in (0, 1, 2, 50, 99, 100)] == [0, 0, 1, 15, 29, 29]
    assert [int(x) for x in robust._portion(2, 3)] == [2, 2, 2, 2]


def brute_force_krum(rows, f, keep):
    """Indices of the kept clients, by loops over float64 rows."""
    count, scores = len(rows), []
    for i in range(count):
        others = sorted(float(np.sum((rows[i] - rows[j]) ** 2)) for j in range(count) if j != i)
        scores.append(sum(others[: max(count - f - 2, 1)]))
    return sorted(np.argsort(scores, kind="stable")[:keep])


choice = jax.jit(robust.krum_choice)


@pytest.mark.parametrize("seed", range(4))
def test_krum_against_loops(seed):
    rng = np.random.default_rng(seed)
    # Leaves of very unequal scale: distances layer by layer, or not squared, choose others.
    updates = {"a": rng.normal(size=(12, 3, 2)).astype(np.float32), "b": 4 * rng.normal(size=12).astype(np.float32)}
    present = rng.permutation(12) < 8 + seed
    rows = joined(updates)[present]
    for f, keep in ((1, 1), (2, None), (2, 3)):
        chosen = choice(updates, jnp.asarray(present, jnp.float32), jnp.int32(f), keep)
        expected = np.flatnonzero(present)[brute_force_krum(rows, f, keep or len(rows) - f)]
        assert list(np.flatnonzero(chosen)) == list(expected)


def scalars(values):
    values = jnp.asarray(values, jnp.float32)
    return GatheredUpdates({"w": values}, jnp.ones_like(values), jnp.ones_like(values), {"malicious": values > 0.9})


def test_published_values():
    krum = jax.jit(robust.krum(1).aggregate)
    update, metrics = krum(scalars([0.2, 0.7, 1.0]), (), None)
    assert float(update["w"]) == pytest.approx(0.7)
    assert metrics["krum_guaranteed"] == 0.0 and metrics["malicious_share"] == 0.0  # 3 clients are fewer than 2 f + 3
    update, metrics = jax.jit(robust.multi_krum(1, 2).aggregate)(scalars([0.2, 0.5, 1.0]), (), None)
    assert float(update["w"]) == pytest.approx(0.35)
    assert float(metrics["krum_chosen_share"]) == pytest.approx(2 / 3)
    # Two clients that are nearest to each other have the same score: the order must not decide.
    assert float(krum(scalars([1.0, 0.7, 0.2]), (), None)[0]["w"]) == pytest.approx(0.7)
    # Five clients, f = 1: the sum over the two nearest, 2 f + 3 = 5.
    update, metrics = jax.jit(robust.krum(0.2).aggregate)(scalars([0.0, 0.1, 0.3, 0.35, 9.0]), (), None)
    assert float(update["w"]) == pytest.approx(0.3) and metrics["krum_guaranteed"] == 1.0


def test_distances_do_not_cancel():
    """What all updates share, and one huge update, leave the small distances right."""
    rng = np.random.default_rng(0)
    rows = (1000.0 + 0.1 * rng.normal(size=(6, 40))).astype(np.float32)
    rows[5] = 1e6
    distances = jax.jit(robust_statistics.squared_distances)
    got = np.asarray(distances({"w": rows[:, :30], "v": rows[:, 30:]}, jnp.ones(6)))
    exact = np.sum((rows[:, None].astype(np.float64) - rows[None].astype(np.float64)) ** 2, axis=-1)
    exact[np.arange(6), np.arange(6)] = np.inf
    np.testing.assert_allclose(got, exact, rtol=1e-4)
    rows[5] = 1e30  # the square overflows
    got = np.asarray(distances({"w": rows[:, :30], "v": rows[:, 30:]}, jnp.ones(6)))
    np.testing.assert_allclose(got[:5, :5], exact[:5, :5], rtol=1e-4)
    assert np.all(np.isinf(got[5]))


def test_geometric_median_against_scipy():
    updates = updates_of(9, seed=3)
    updates["a"][0] += 50.0  # far away
    weights = np.asarray([2.0, 1.0, 1.0, 0.0, 3.0, 1.0, 1.0, 2.0, 0.5], np.float32)
    rows = joined(updates)
    cost = lambda v: np.sum(weights * np.linalg.norm(rows - v, axis=1))
    best = scipy.optimize.minimize(cost, np.median(rows, axis=0), method="BFGS", options={"gtol": 1e-9}).x
    update, metrics = compiled("geometric_median")(updates, weights)
    np.testing.assert_allclose(vector(update), best, atol=2e-4)
    assert cost(vector(update)) <= cost(best) * (1 + 1e-6)
    assert 3 <= float(metrics["weiszfeld_iterations"]) < 50
    # Weights are data sizes: a client of weight 3 is three clients of weight 1.
    split = jax.tree.map(lambda x: np.concatenate([x, x[4:5], x[4:5]]), updates)
    ones = np.concatenate([weights, [1.0, 1.0]]).astype(np.float32)
    ones[4] = 1.0
    close(compiled("geometric_median")(split, ones)[0], update, 1e-4)
    # A majority of the weight in one place is the median, whatever the others say.
    majority = weights.copy()
    majority[4] = 10.0
    np.testing.assert_allclose(vector(compiled("geometric_median")(updates, majority)[0]), rows[4], atol=2e-4)


def test_norm_bound_against_numpy():
    updates = updates_of(CLIENTS)
    updates["c"][3] = 1e25  # its square overflows
    bound = 2.0
    rows = joined(updates)
    norms = np.linalg.norm(rows, axis=1)
    assert 1 < np.sum(norms > bound) < CLIENTS
    bounded, reported = jax.jit(jax.vmap(lambda m: robust.norm_bound(bound).transform_update(m, ())))(updates)
    np.testing.assert_allclose(joined(bounded), rows * np.minimum(1.0, bound / norms)[:, None], rtol=2e-6)
    unclipped = norms <= bound
    np.testing.assert_array_equal(joined(bounded)[unclipped], rows[unclipped])
    np.testing.assert_array_equal(reported["clipped_share"], norms > bound)
    np.testing.assert_allclose(reported["update_norm"], norms, rtol=1e-6)
    zero, reported = robust.norm_bound(bound).transform_update(jax.tree.map(jnp.zeros_like, REFERENCE), ())
    assert all(np.all(x == 0.0) for x in jax.tree.leaves(zero)) and reported["clipped_share"] == 0.0


def test_fltrust_against_numpy():
    updates, weights = updates_of(CLIENTS), np.ones(CLIENTS, np.float32)
    for leaf in updates.values():
        leaf[[1, 4]] *= -1.0
    rows, reference = joined(updates), vector(REFERENCE)
    norms, size = np.linalg.norm(rows, axis=1), np.linalg.norm(reference)
    trust = np.maximum(rows @ reference / norms / size, 0.0)
    expected = (trust * size / norms) @ rows / trust.sum()
    update, metrics = compiled("fltrust")(updates, weights)
    np.testing.assert_allclose(vector(update), expected, rtol=1e-5, atol=1e-6)
    assert float(metrics["trust_mean"]) == pytest.approx(trust.mean(), rel=1e-5)
    got = np.asarray(robust.trust_scores(updates, weights, REFERENCE))
    assert got[1] == 0.0 and got[4] == 0.0 and np.sum(got > 0) == 5

    # The scale of an attack changes nothing, whether it points the reference's way or against it.
    for client in (1, 2):
        for factor in (1e-20, 1e6, 1e30):
            rescaled = jax.tree.map(np.copy, updates)
            for leaf in rescaled.values():
                leaf[client] *= np.float32(factor)
            close(compiled("fltrust")(rescaled, weights)[0], update)
    # A client without trust does not count at all.
    without = weights.copy()
    without[[1, 4]] = 0.0
    jax.tree.map(np.testing.assert_array_equal, compiled("fltrust")(updates, without)[0], update)
    # A reference that says nothing, or is broken, moves nothing.
    for value in (0.0, np.nan):
        nothing = jax.tree.map(lambda x: np.full_like(x, value), REFERENCE)
        gathered = GatheredUpdates(updates, jnp.asarray(weights), jnp.asarray(weights), {}, nothing)
        assert np.all(vector(jax.jit(robust.fltrust().aggregate)(gathered, (), None)[0]) == 0.0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: robust.trimmed(0.5), "trimmed fraction"),
        (lambda: robust.krum(1.5), "whole number"),
        (lambda: robust.krum(0.5), "below 0.5"),
        (lambda: robust.multi_krum(1, 0), "num_kept"),
        (lambda: robust.norm_bound(0.0), "bound"),
        (lambda: robust.geometric_median(smoothing=0.0), "smoothing"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["median", "fltrust"])
def test_in_a_round_over_devices(name):
    """11 clients on 8 devices, each a step from its own optimum: two flip the sign, one sends NaN, one is lost."""
    rng = np.random.default_rng(0)
    optima = (2.0 + 0.3 * rng.normal(size=(11, 1, 1, 4))).astype(np.float32)
    optima[6] = np.nan
    malicious, delivered = np.isin(np.arange(11), (2, 5)), np.arange(11) != 8
    server_data = np.full((1, 1, 4), 1.9, np.float32)
    cohort = Cohort(
        np.arange(11, dtype=np.int32),
        np.where(delivered, np.float32(3.0), np.float32(0.0)),
        optima,
        delivered=delivered,
        extras={"malicious": malicious},
        server_batches=server_data,
    )
    loss = lambda params, frozen, batch, key: 0.5 * jnp.sum((params["w"] - batch[0]) ** 2)
    algorithm = fed_opt(jax.value_and_grad(loss), optax.sgd(1.0))
    whole = make_round(algorithm, aggregator=AGGREGATORS[name], attack=attacks.sign_flip(2.0))
    state = replicate(whole.init({"w": jnp.zeros(4)}, 7))
    state, metrics, _ = pmap_round(whole)(state, (), put_on_devices(cohort))
    values = optima[:, 0, 0].astype(np.float64)
    sent = np.where(malicious[:, None], -2.0 * values, values)[[0, 1, 2, 3, 4, 5, 7, 9, 10]]
    if name == "median":
        expected = np.median(sent, axis=0)
    else:
        honest = np.delete(sent, [2, 5], axis=0)
        units = honest / np.linalg.norm(honest, axis=1, keepdims=True)
        trust = units @ server_data[0, 0] / np.linalg.norm(server_data)
        expected = np.linalg.norm(server_data) * trust @ units / trust.sum()
        assert float(metrics["trusted_share"]) == pytest.approx(7 / 9) and float(metrics["malicious_share"]) == 0.0
    np.testing.assert_allclose(state.params["w"], expected, rtol=1e-5)
    assert float(metrics["dropped_clients"]) == 1.0
