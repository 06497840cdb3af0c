"""Accountants against published-library values and closed forms; the audit finds what is broken and nothing else."""

import dataclasses
import math
import time

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from scipy import optimize, stats

from fmfl_jax.fed.aggregators.dp_fedavg import AdaptiveClipping, dp_fedavg
from fmfl_jax.fed.core.types import Aggregator
from fmfl_jax.fed.privacy import accounting, audit
from fmfl_jax.fed.privacy.accounting import SampledGaussian, epsilon_pld, epsilon_rdp, privacy_spent


@pytest.mark.parametrize(
    "rate, z, steps, rdp, pld",
    [(0.01, 1.0, 1000, 2.10137, 1.82824), (0.1, 1.0, 100, 7.90385, 7.04660), (1.0, 8.0, 100, 6.12276, 5.67959)],
)
def test_values_of_dp_accounting(rate, z, steps, rdp, pld):
    spent = privacy_spent([(SampledGaussian(rate, z), steps)], 1e-5)
    np.testing.assert_allclose([spent.epsilon_rdp, spent.epsilon_pld], [rdp, pld], atol=1e-4)


@pytest.mark.parametrize("z, delta", [(1.0, 1e-5), (3.0, 1e-3)])
def test_one_gaussian_release_costs_what_balle_and_wang_prove(z, delta):
    """delta(epsilon) = Phi(1 / 2z - epsilon z) - e^epsilon Phi(-1 / 2z - epsilon z) (ICML 2018, theorem 8)."""
    cdf = stats.norm.cdf
    exact = optimize.brentq(lambda e: cdf(0.5 / z - e * z) - math.exp(e) * cdf(-0.5 / z - e * z) - delta, 1e-6, 50)
    pld = epsilon_pld([(SampledGaussian(1.0, z), 1)], delta)
    assert exact - 1e-9 <= pld <= exact + 1e-3
    assert epsilon_rdp([(SampledGaussian(1.0, z), 1)], delta) >= exact


def test_composition():
    """k Gaussians without sampling are one of z / sqrt(k); parts add up in any order; less of a run costs less."""
    one, other, triple = SampledGaussian(1.0, 6.0), SampledGaussian(0.2, 1.5), SampledGaussian(1.0, 2.0)
    for epsilon in (epsilon_rdp, epsilon_pld):
        np.testing.assert_allclose(epsilon([(one, 9)], 1e-5), epsilon([(triple, 1)], 1e-5), rtol=1e-3)
        mixed = epsilon([(one, 4), (other, 10)], 1e-5)
        np.testing.assert_allclose(epsilon([(other, 7), (one, 4), (other, 3)], 1e-5), mixed, rtol=1e-5)
        assert epsilon([(one, 4)], 1e-5) < mixed and epsilon([(other, 10)], 1e-5) < mixed
        assert epsilon([], 1e-5) == epsilon([(one, 0)], 1e-5) == 0
        assert epsilon([(one, 4), (SampledGaussian(0.1, 0.0), 1)], 1e-5) == math.inf
    assert epsilon_pld([(SampledGaussian(0.1, 0.3), 100)], 1e-5) < math.inf  # where privacy is lost it still ends
    assert epsilon_pld([(SampledGaussian(1.0, 1e-3), 1000)], 1e-5) > 1e6


@pytest.mark.parametrize("epsilon", [epsilon_rdp, epsilon_pld])
@pytest.mark.parametrize("target, rate, steps", [(2.0, 0.2, 20), (0.3, 1.0, 3), (30.0, 1.0, 2)])
def test_calibration_round_trips(epsilon, target, rate, steps):
    z = accounting.calibrate_noise(target, sampling_rate=rate, steps=steps, delta=1e-5, epsilon=epsilon)
    assert 0.995 * target <= epsilon([(SampledGaussian(rate, z), steps)], 1e-5) <= target


def direct_epsilon(rate, z, steps, delta=1e-5):
    """dp-accounting's on its own grid of 1e-4."""
    pld = privacy_loss_distribution.from_gaussian_mechanism(z, sampling_prob=rate)
    return pld.self_compose(steps).get_epsilon_for_delta(delta)


@pytest.mark.parametrize(
    "rate, z, steps",
    [(0.01, 1.0, 1), (0.001, 2.0, 1), (0.001, 2.0, 10_000), (0.01, 2.0, 10_000), (0.1, 2.0, 100), (0.001, 1.0, 1000)],
)
def test_refined_grids_are_as_good_as_the_finest(rate, z, steps):
    found, direct = epsilon_pld([(SampledGaussian(rate, z), steps)], 1e-5), direct_epsilon(rate, z, steps)
    assert direct - 1e-9 <= found <= direct + 1e-4


@pytest.mark.parametrize("target, rate, steps", [(0.2, 0.01, 1), (0.05, 0.001, 10_000)])
def test_calibration_with_few_steps_is_fast_exact_and_tells_how_it_goes(monkeypatch, target, rate, steps):
    monkeypatch.setattr(accounting, "_PATIENCE_S", 0.0)
    lines, started = [], time.process_time()
    z = accounting.calibrate_noise(target, sampling_rate=rate, steps=steps, delta=1e-5, progress=lines.append)
    assert time.process_time() - started < 10
    assert direct_epsilon(rate, z, steps) <= target < direct_epsilon(rate, z / 1.0002, steps) + 1e-4
    assert lines and f"{z:.5g} gives" in lines[-1] and f"epsilon {target:g}" in lines[-1]


def test_a_cost_that_steps_or_vanishes_is_searched_too():
    """From either side, across zeros and infinities, and where secants alone would creep up from one side."""
    for cost in (
        lambda z: math.inf if z < 0.01 else max(0.0, 3.0 - z),
        lambda z: 5.0 if z < 2.345 else 0.1,
        lambda z: math.exp(-((z - 1) ** 3)),
    ):
        exact = optimize.brentq(lambda z: cost(z) - 0.9, 0.1, 4.0)
        for start in (1e-3, 1.0, 300.0):
            found, _ = accounting._smallest(cost, 0.9, (start, -1.0), slack=0.0)
            assert cost(found) <= 0.9 and abs(found / exact - 1) < 2e-4


def test_example_level_cost_is_that_of_the_worst_client():
    num_examples, steps = [100, 40, 400, 40, 5], [30, 12, 30, 4, 1]
    spent = accounting.example_level_spent(num_examples, steps, batch_size=8, noise_multiplier=2.0, delta=1e-4)
    each = [privacy_spent([(SampledGaussian(min(1.0, 8 / n), 2.0), t)], 1e-4) for n, t in zip(num_examples, steps)]
    assert spent.epsilon_rdp == max(s.epsilon_rdp for s in each)
    assert spent.epsilon_pld == max(s.epsilon_pld for s in each)
    with pytest.raises(ValueError, match="num_examples"):
        accounting.example_level_spent([0], [1], batch_size=8, noise_multiplier=2.0, delta=1e-4)


def test_bad_numbers():
    release = SampledGaussian(0.1, 1.0)
    for delta in (0.0, -1e-5, 1.0):
        with pytest.raises(ValueError, match="delta is"):
            privacy_spent([(release, 1)], delta)
    for rate in (0.0, 1.5):
        with pytest.raises(ValueError, match="sampling_rate is"):
            SampledGaussian(rate, 1.0)
    with pytest.raises(ValueError, match="noise_multiplier is -1"):
        SampledGaussian(0.1, -1.0)
    with pytest.raises(ValueError, match="made -1 times"):
        privacy_spent([(release, -1)], 1e-5)
    with pytest.raises(ValueError, match="target_epsilon is 0"):
        accounting.calibrate_noise(0.0, sampling_rate=0.1, steps=3, delta=1e-5)
    with pytest.raises(ValueError, match="no noise brings"):
        accounting.calibrate_noise(1e-9, sampling_rate=1.0, steps=1000, delta=1e-12, epsilon=epsilon_rdp)


# The audit: 20 clients, everyone in each of 4 rounds, a claimed noise multiplier of 2.
RUNS = {"num_runs": 4000, "num_clients": 20, "sampling_rate": 1.0, "rounds": 4}
CLAIMED, DELTA = SampledGaussian(1.0, 2.0), 1e-3
CLIPPED = {"clip_norm": 1.0, "noise_multiplier": 2.0, "expected_cohort": 20.0}


def audited(aggregator, scalar_share=0.5):
    scores = audit.canary_scores(aggregator, **RUNS, scalar_share=scalar_share)
    return audit.epsilon_lower_bound(*scores, delta=DELTA).epsilon


@pytest.mark.parametrize(
    "how, scalar_share",
    [({}, 1.0), ({"weighting": "capped", "cap": 20.0}, 0.5), ({"adaptive": AdaptiveClipping(bits_std=2.0)}, 0.5)],
)
def test_audit_finds_nothing_where_the_noise_is_on(how, scalar_share):
    allowed = epsilon_pld([(CLAIMED, RUNS["rounds"])], DELTA)
    found = audited(dp_fedavg(**CLIPPED, **how), scalar_share)
    assert 0.2 * allowed < found < allowed  # the attack works, and learns no more than it may


def without_clipping_scalars(aggregator):
    def transform_update(update, state):
        clipped, metrics = aggregator.transform_update(update, state)
        return {"w": clipped["w"], "b": update["b"]}, metrics

    return dataclasses.replace(aggregator, transform_update=transform_update)


def without_noise_on_scalars(aggregator):
    def postprocess(mean, state, key):
        update, state, metrics = aggregator.postprocess(mean, state, key)
        scale = mean.denominator / np.float32(CLIPPED["expected_cohort"])
        return {"w": update["w"], "b": mean.update["b"] * scale}, state, metrics

    return dataclasses.replace(aggregator, postprocess=postprocess)


@pytest.mark.parametrize(
    "name, broken, scalar_share",
    [
        ("a third of the noise", dp_fedavg(**CLIPPED | {"noise_multiplier": 0.7}), 0.5),
        ("weights by data size", dataclasses.replace(dp_fedavg(**CLIPPED), weighting=None), 0.5),
        ("scalars not clipped", without_clipping_scalars(dp_fedavg(**CLIPPED)), 1.0),
        ("scalars not noised", without_noise_on_scalars(dp_fedavg(**CLIPPED)), 1.0),
        ("not private at all", Aggregator(), 0.5),
    ],
)
def test_audit_finds_what_is_broken(name, broken, scalar_share):
    found = audited(broken, scalar_share)
    assert found > epsilon_pld([(CLAIMED, RUNS["rounds"])], DELTA), name


def test_lower_bound_holds_with_its_confidence():
    """Scores from one Gaussian release, whose epsilon is known: of 200 bounds at 90 % few exceed it."""
    z, delta, rng = 1.0, 1e-2, np.random.default_rng(0)
    exact = epsilon_pld([(SampledGaussian(1.0, z), 1)], delta)
    args = {"delta": delta, "confidence": 0.9}
    bounds = [
        audit.epsilon_lower_bound(rng.normal(0, z, 400), rng.normal(1, z, 400), **args).epsilon for _ in range(200)
    ]
    assert np.mean(np.asarray(bounds) > exact) <= 0.1 and np.median(bounds) > 0.2 * exact
    same = [
        audit.epsilon_lower_bound(rng.normal(size=400), rng.normal(size=400), delta=0.0, confidence=0.9).epsilon
        for _ in range(200)
    ]
    assert np.mean(np.asarray(same) > 0) <= 0.1
    for delta in (0.0, 0.6):  # perfect separation of 200: the rates' bounds are roots of the error
        root = 0.05 ** (1 / 200)
        perfect = audit.epsilon_lower_bound(np.zeros(400), np.ones(400), delta=delta, confidence=0.9)
        np.testing.assert_allclose(perfect.epsilon, np.log((root - delta) / (1 - root)), rtol=1e-9)
    out = np.arange(400) % 2.0  # what tells most here is that 0 is never seen with the canary
    reverse = audit.epsilon_lower_bound(out, np.ones(400), delta=0.0)
    assert reverse == (reverse.epsilon, 0.5, 0.0, 1.0, False) and reverse.epsilon > 2
    with pytest.raises(ValueError, match="as many scores"):
        audit.epsilon_lower_bound(np.ones(4), np.ones(5), delta=0.0)
