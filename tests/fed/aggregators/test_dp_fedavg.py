"""What the guarantee rests on: the sensitivity of a whole round, and the noise that is added to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.fed.aggregators.dp_fedavg import AdaptiveClipping, ClippingState, dp_fedavg, update_noise_multiplier
from fmfl_jax.fed.aggregators.secure import secure
from fmfl_jax.fed.core.cohort import put_on_devices
from fmfl_jax.fed.core.execution import pmap_round
from fmfl_jax.fed.core.round import make_round
from fmfl_jax.fed.core.types import (
    Aggregate,
    ClientResult,
    ClientUpdate,
    Cohort,
    FederatedAlgorithm,
    Phase,
    ServerState,
)
from fmfl_jax.fed.privacy.clipping import clip_by_norm, global_norm
from fmfl_jax.fed.secure.fixed_point import FixedPoint, rounding_norm
from fmfl_jax.parallel import AXIS, replicate

M, CLIP = 6.0, 0.7  # the expected cohort, and the clipping norm
TEMPLATE = {"a": jnp.zeros((3, 4)), "b": jnp.zeros(()), "c": jnp.zeros(2)}


def round_of(aggregator):
    """Clients send what their only batch holds; the server's parameters are what was released."""

    def step(context, work, batch, key):
        return batch, {"loss": jnp.float32(0.0)}

    client = ClientUpdate(
        begin=lambda context: context.message,
        phases=(Phase(step=step),),
        finish=lambda context, work, metrics: ClientResult(work, context.weight, (), metrics),
    )
    algorithm = FederatedAlgorithm(
        init=lambda params, seed: ServerState(params, (), jnp.zeros((), jnp.int32), jnp.uint32(seed)),
        client=client,
        server=lambda state, aggregate: state._replace(params=aggregate.update),
    )
    return make_round(algorithm, aggregator=aggregator)


def one_batch(updates):
    """[C, ...] -> [C, 1, ...], a batch of each client's only step."""
    return jax.tree.map(lambda x: x[:, None], updates)


def rounds_of(aggregator):
    """release(updates, num_examples, delivered) -> (update, metrics, state): the real round on one device, compiled
    once for all calls."""
    whole = round_of(aggregator)
    step = jax.jit(jax.vmap(whole.spmd, in_axes=(None, None, 0), axis_name=AXIS))

    def release(updates, num_examples, delivered):
        weights = jnp.where(delivered, aggregator.weighting(num_examples), 0.0)
        cohort = Cohort(
            jnp.arange(len(delivered), dtype=jnp.int32),
            weights,
            one_batch(updates),
            weights,
            (),
            jnp.asarray(delivered),
        )
        state, metrics, _ = step(whole.init(TEMPLATE, 0), (), jax.tree.map(lambda x: x[None], cohort))
        state, metrics = jax.tree.map(lambda x: x[0], (state, metrics))
        return state.params, metrics, state

    return release


def random_updates(rng, num_clients):
    """Norms from far below the clip to far above it; some updates are zero, some in a scalar leaf alone."""
    updates = jax.tree.map(lambda x: rng.normal(size=(num_clients, *x.shape)), TEMPLATE)
    scale = 10.0 ** rng.uniform(-3, 3, num_clients) * (rng.random(num_clients) > 0.2)
    updates = jax.tree.map(lambda x: x * scale.reshape(-1, *(1,) * (x.ndim - 1)), updates)
    alone = rng.random(num_clients) < 0.2
    updates["a"][alone] = 0
    updates["c"][alone] = 0
    return jax.tree.map(lambda x: x.astype(np.float32), updates)


def distance(a, b):
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(a[name]) - np.asarray(b[name]))) for name in a)))


WEIGHTINGS = {"uniform": {}, "capped": {"weighting": "capped", "cap": 10.0}}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_one_client_moves_the_sum_by_at_most_the_sensitivity(weighting):
    """Adding or removing any one client: C / m. Replacing its data: twice that. And the bound is reached."""
    release = rounds_of(dp_fedavg(clip_norm=CLIP, noise_multiplier=0.0, expected_cohort=M, **WEIGHTINGS[weighting]))
    rng, worst = np.random.default_rng(0), 0.0
    for _ in range(20):
        updates, others = random_updates(rng, 8), random_updates(rng, 8)
        num_examples, delivered = rng.integers(1, 100, 8).astype(np.float32), rng.random(8) < 0.7
        before, *_ = release(updates, num_examples, delivered)
        for client in range(8):
            flipped = delivered.copy()
            flipped[client] ^= True
            after, *_ = release(updates, num_examples, flipped)
            moved = distance(before, after)
            worst = max(worst, moved)
            assert moved <= CLIP / M * (1 + 1e-5)
            swapped = jax.tree.map(
                lambda x, y: np.concatenate([x[:client], y[client : client + 1], x[client + 1 :]]), updates, others
            )
            sizes = np.where(np.arange(8) == client, rng.integers(1, 100), num_examples).astype(np.float32)
            after, *_ = release(swapped, sizes, delivered)
            assert distance(before, after) <= 2 * CLIP / M * (1 + 1e-5)
    assert worst > 0.999 * CLIP / M


def test_clipping_of_whole_trees():
    updates, clip = random_updates(np.random.default_rng(1), 50), jax.jit(clip_by_norm)
    for client in range(50):
        update = jax.tree.map(lambda x: x[client], updates)
        clipped, norm = clip(update, jnp.float32(CLIP))
        flat = np.concatenate([np.ravel(update[name]) for name in "abc"]).astype(np.float64)
        np.testing.assert_allclose(norm, np.linalg.norm(flat), rtol=1e-6)
        expected = flat * min(1.0, CLIP / max(np.linalg.norm(flat), 1e-30))
        np.testing.assert_allclose(np.concatenate([np.ravel(clipped[name]) for name in "abc"]), expected, rtol=1e-5)
        if np.linalg.norm(flat) < CLIP:
            jax.tree.map(np.testing.assert_array_equal, clipped, update)
    assert global_norm({}) == 0
    overflow, _ = clip_by_norm({"x": jnp.full(3, 3e38)}, jnp.float32(CLIP))
    assert (overflow["x"] == 0).all()


def test_noise_has_the_stated_standard_deviation_in_every_leaf():
    """An empty cohort gives noise alone; over 400 rounds its mean and variance are within 4 standard errors."""
    whole = round_of(dp_fedavg(clip_norm=CLIP, noise_multiplier=1.3, expected_cohort=M))
    zeros = jax.tree.map(lambda x: jnp.zeros((1, 1, 1, *x.shape)), TEMPLATE)
    nothing = jnp.zeros((1, 1))
    cohort = Cohort(nothing.astype(jnp.int32), nothing, zeros, nothing, (), nothing.astype(bool))

    def one(state, _):
        state, metrics, _ = jax.vmap(whole.spmd, in_axes=(None, None, 0), axis_name=AXIS)(state, (), cohort)
        state, metrics = jax.tree.map(lambda x: x[0], (state, metrics))
        return state, (state.params, metrics["noise_std"])

    _, (noise, stated) = jax.jit(lambda state: jax.lax.scan(one, state, None, length=400))(whole.init(TEMPLATE, 0))
    std = 1.3 * CLIP / M
    np.testing.assert_allclose(stated, std, rtol=1e-6)
    for leaf in jax.tree.leaves(noise):
        n = leaf.size
        assert abs(np.mean(leaf)) < 4 * std / np.sqrt(n)
        assert abs(np.var(leaf) - std**2) < 4 * std**2 * np.sqrt(2 / n)
    flat = np.concatenate([np.reshape(leaf, (400, -1)) for leaf in jax.tree.leaves(noise)], axis=1)
    correlation = np.corrcoef(flat.T) - np.eye(flat.shape[1])
    assert np.abs(correlation).max() < 5 / np.sqrt(400)  # 105 pairs


def test_the_denominator_is_fixed_and_the_noise_the_same_whoever_takes_part():
    noisy = rounds_of(dp_fedavg(clip_norm=CLIP, noise_multiplier=1.0, expected_cohort=M))
    plain = rounds_of(dp_fedavg(clip_norm=CLIP, noise_multiplier=0.0, expected_cohort=M))
    rng = np.random.default_rng(2)
    updates, ones = random_updates(rng, 8), np.ones(8, np.float32)
    noise, *_ = noisy(updates, ones, np.zeros(8, bool))  # of an empty cohort, and applied all the same
    assert float(global_norm(noise)) > 0
    for delivered in (np.arange(8) < 3, np.ones(8, bool)):
        clipped = [
            clip_by_norm(jax.tree.map(lambda x: x[c], updates), jnp.float32(CLIP))[0] for c in np.flatnonzero(delivered)
        ]
        expected = jax.tree.map(lambda *x: np.sum(x, axis=0) / M, *clipped)
        exact, *_ = plain(updates, ones, delivered)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), exact, expected)
        update, metrics, _ = noisy(updates, ones, delivered)
        jax.tree.map(lambda x, y, z: np.testing.assert_allclose(x, y + z, atol=1e-6), update, expected, noise)
        norms = jax.vmap(global_norm)(updates)[delivered]
        np.testing.assert_allclose(metrics["clipped_share"], np.mean(norms > CLIP), atol=1e-6)


def test_noise_is_the_same_on_all_devices_and_for_any_number_of_them():
    aggregator = dp_fedavg(clip_norm=CLIP, noise_multiplier=1.0, expected_cohort=M)
    whole = round_of(aggregator)
    updates = random_updates(np.random.default_rng(3), 5)
    cohort = Cohort(np.arange(5, dtype=np.int32), np.ones(5, np.float32), one_batch(updates))
    state, *_ = pmap_round(whole)(replicate(whole.init(TEMPLATE, 0)), (), put_on_devices(cohort))
    expected, *_ = rounds_of(aggregator)(updates, np.ones(5, np.float32), np.ones(5, bool))
    for leaf, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected)):
        for shard in leaf.addressable_shards:
            np.testing.assert_allclose(shard.data, other, atol=1e-6)


def test_an_update_that_is_not_finite_adds_nothing():
    release = rounds_of(dp_fedavg(clip_norm=CLIP, noise_multiplier=1.0, expected_cohort=M))
    updates, ones = random_updates(np.random.default_rng(4), 8), np.ones(8, np.float32)
    bad = jax.tree.map(np.copy, updates)
    bad["b"][2], bad["c"][5, 0] = np.nan, np.inf
    with_bad, *_ = release(bad, ones, np.ones(8, bool))
    without, *_ = release(updates, ones, ~np.isin(np.arange(8), [2, 5]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), with_bad, without)


def test_secure_aggregation_releases_the_same():
    """The rounding of the integers is all that differs, and the slack covers it."""
    codec = FixedPoint(clip=1.0, bits=12, max_clients=8)
    slack = rounding_norm(codec, TEMPLATE)
    aggregator = dp_fedavg(clip_norm=CLIP, noise_multiplier=1.0, expected_cohort=M, slack=slack)
    updates, ones = random_updates(np.random.default_rng(5), 8), np.ones(8, np.float32)
    masked, metrics, _ = rounds_of(secure(aggregator, codec, max_weight=1.0))(updates, ones, np.arange(8) < 6)
    plain, *_ = rounds_of(aggregator)(updates, ones, np.arange(8) < 6)
    assert distance(masked, plain) <= 6 * slack / M + 1e-5
    np.testing.assert_allclose(metrics["noise_std"], (CLIP + slack) / M, rtol=1e-6)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
def test_adaptive_clipping_finds_the_quantile(quantile):
    """Norms are log-normal: the clip converges to exp(gamma's quantile of the normal) from far off."""
    adaptive = AdaptiveClipping(quantile=quantile, bits_std=3.0)
    aggregator = dp_fedavg(clip_norm=50.0, noise_multiplier=1.0, expected_cohort=60.0, adaptive=adaptive)
    norms = np.exp(np.random.default_rng(6).normal(size=(400, 60))).astype(np.float32)

    def one(state, given):
        norms, key = given
        _, scalars = jax.vmap(lambda x: aggregator.transform_update({"x": x[None]}, state))(norms)
        count = jnp.float32(60.0)
        mean = Aggregate({"x": jnp.zeros(1)}, jax.tree.map(jnp.mean, scalars), count, count)
        _, state, metrics = aggregator.postprocess(mean, state, key)
        return state, (state.clip_norm, metrics["private_unclipped_share"])

    keys = jax.random.split(jax.random.key(0), 400)
    _, (clips, shares) = jax.jit(lambda state: jax.lax.scan(one, state, (norms, keys)))(aggregator.init(None))
    expected = np.quantile(norms, quantile)
    assert abs(np.log(np.median(clips[200:]) / expected)) < 0.1
    assert abs(np.mean(shares[200:]) - quantile) < 0.02


def test_adaptive_clipping_as_published():
    """One update of the clip by hand, the split of the noise, and the sensitivity of the bits: 1/2."""
    adaptive = AdaptiveClipping(quantile=0.3, learning_rate=0.5, bits_std=0.0)
    release = rounds_of(dp_fedavg(clip_norm=CLIP, noise_multiplier=0.0, expected_cohort=M, adaptive=adaptive))
    updates, ones = random_updates(np.random.default_rng(7), 8), np.ones(8, np.float32)
    shares = {}
    for removed in (None, *range(8)):
        _, metrics, state = release(updates, ones, np.arange(8) != removed)
        shares[removed] = float(metrics["private_unclipped_share"])
        bits = np.asarray(jax.vmap(global_norm)(updates) <= CLIP)[np.arange(8) != removed]
        share = 0.5 + np.sum(bits - 0.5) / M
        np.testing.assert_allclose(shares[removed], share, rtol=1e-5)
        np.testing.assert_allclose(state.aggregator.clip_norm, CLIP * np.exp(-0.5 * (share - 0.3)), rtol=1e-5)
    moved = [abs(shares[client] - shares[None]) for client in range(8)]
    np.testing.assert_allclose(moved, 0.5 / M, rtol=1e-4)

    z = update_noise_multiplier(1.0, 5.0)
    np.testing.assert_allclose(z, 1 / np.sqrt(0.99))  # 1 - 1 / 10^2
    # Both releases on one scale: (1 / z)^2 + (1/2 / bits_std)^2 is what (1 / noise_multiplier)^2 allows.
    np.testing.assert_allclose(z**-2 + (0.5 / 5.0) ** 2, 1.0)
    aggregator = dp_fedavg(clip_norm=CLIP, noise_multiplier=1.0, expected_cohort=100.0, adaptive=AdaptiveClipping())
    mean = Aggregate({"x": jnp.zeros(1)}, {"clipped_share": jnp.float32(0.0)}, jnp.float32(0.0), jnp.float32(0.0))
    _, _, metrics = aggregator.postprocess(mean, aggregator.init(None), jax.random.key(0))
    np.testing.assert_allclose(metrics["noise_std"], z * CLIP / 100, rtol=1e-6)  # bits_std = 100 / 20
    with pytest.raises(ValueError, match="bits of adaptive clipping alone cost more"):
        dp_fedavg(clip_norm=CLIP, noise_multiplier=1.0, expected_cohort=10.0, adaptive=AdaptiveClipping())


def test_bits_are_noised():
    adaptive = AdaptiveClipping(bits_std=2.0)
    aggregator = dp_fedavg(clip_norm=CLIP, noise_multiplier=1.0, expected_cohort=M, adaptive=adaptive)
    mean = Aggregate({"x": jnp.zeros(1)}, {"clipped_share": jnp.float32(0.25)}, jnp.float32(4.0), jnp.float32(4.0))
    postprocess = jax.jit(
        jax.vmap(lambda key: aggregator.postprocess(mean, ClippingState(jnp.float32(CLIP)), key)[::2])
    )
    update, metrics = postprocess(jax.random.split(jax.random.key(1), 2000))
    shares = np.asarray(metrics["private_unclipped_share"])
    assert abs(shares.mean() - (0.5 + 1.0 / M)) < 4 * 2.0 / M / np.sqrt(2000)
    assert abs(shares.var() - (2.0 / M) ** 2) < 4 * (2.0 / M) ** 2 * np.sqrt(2 / 2000)
    assert abs(np.corrcoef(shares, update["x"][:, 0])[0, 1]) < 4 / np.sqrt(2000)


def test_weights():
    given = np.asarray([1, 5, 10, 1000], np.float32)
    args = {"clip_norm": CLIP, "noise_multiplier": 1.0, "expected_cohort": M}
    np.testing.assert_array_equal(dp_fedavg(**args).weighting(given), [1, 1, 1, 1])
    np.testing.assert_allclose(dp_fedavg(**args, weighting="capped", cap=10.0).weighting(given), [0.1, 0.5, 1, 1])
    with pytest.raises(ValueError, match="Weights by data size have no bound"):
        dp_fedavg(**args, weighting="examples")
    for bad, message in (
        ({"weighting": "capped"}, "needs a cap"),
        ({"cap": 3.0}, "uniform takes none"),
        ({"clip_norm": 0.0}, "clip_norm is 0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier is -1"),
        ({"expected_cohort": float("inf")}, "expected_cohort is inf"),
        ({"slack": -1.0}, "slack is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            dp_fedavg(**args | bad)
