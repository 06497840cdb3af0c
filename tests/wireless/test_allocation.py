"""Allocations against the golden values of the facts and against independent optima (scipy, brute force)."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from fmfl_jax.wireless import link, path_loss
from fmfl_jax.wireless.allocation import assignment, fdma, power, schedule, tdma


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


# Compiled once for all tests, in each precision.
_bandwidth_for_rate = jax.jit(fdma.bandwidth_for_rate)
_min_max_time = jax.jit(fdma.min_max_time, static_argnums=2)
_min_energy = jax.jit(fdma.min_energy)


def _cn0(distance_m, power_dbm):
    return link.carrier_to_noise_hz(power_dbm, -path_loss.log_distance_db(jnp.asarray(distance_m)))


def _rings():
    return 500.0 * np.sqrt((np.arange(20) + 0.5) / 20)


def test_bandwidth_for_a_rate_golden(x64):
    b = _bandwidth_for_rate(1e5, _cn0([100.0, 200.0, 300.0, 400.0, 500.0], 10.0))
    np.testing.assert_allclose(b, [5355.241, 6871.073, 8273.628, 9713.006, 11270.993], rtol=1e-7)
    infeasible = _bandwidth_for_rate(
        jnp.asarray([1e5, 1e5, 0.0]), jnp.asarray([1e5 * np.log(2) * (1 - 1e-9), 0.0, 1.0])
    )
    np.testing.assert_array_equal(infeasible, [np.inf, np.inf, 0.0])


@pytest.mark.parametrize("payload_bytes, equal_s, optimal_s", [(8388608, 9.87, 7.67), (163840, 0.193, 0.150)])
def test_min_max_time_golden(x64, payload_bytes, equal_s, optimal_s):
    cn0, bits = _cn0(_rings(), 23.0), jnp.full(20, 8.0 * payload_bytes)
    best = _min_max_time(bits, cn0, 20e6)
    assert float(best.time_s) == pytest.approx(optimal_s, rel=3e-3)
    assert float(jnp.max(bits / link.shannon_rate_bps(jnp.full(20, 1e6), cn0))) == pytest.approx(equal_s, rel=3e-3)
    ends = bits / link.shannon_rate_bps(best.bandwidth_hz, cn0)
    np.testing.assert_allclose(ends, best.time_s, rtol=1e-9)
    assert float(jnp.sum(best.bandwidth_hz)) == pytest.approx(20e6, rel=1e-9)


def _random_case(seed, users=4):
    rng = np.random.default_rng(seed)
    cn0 = 10 ** rng.uniform(4.5, 8.0, users)
    return rng.uniform(1e4, 1e6, users), cn0, rng.uniform(0.0, 0.5, users)


def test_min_max_time_is_optimal_against_nested_bisection(x64):
    """Oracle: scipy's root of sum b_k(T) = B, each b_k the root of its own rate equation, for 8 random cases in one
    vmap."""
    cases = [_random_case(seed) for seed in range(8)]
    payload, cn0, ready = (np.stack(x) for x in zip(*cases))
    best = jax.jit(jax.vmap(lambda s, c, r: fdma.min_max_time(s, c, 1e6, r)))(payload, cn0, ready)
    for i in range(8):

        def band(duration, s, c):
            rate = lambda b: b * np.log2(1.0 + c / b) - s / duration
            return scipy.optimize.brentq(rate, 1e-3, 1e14, xtol=1e-9) if rate(1e14) > 0 else 1e14

        excess = lambda end: sum(band(end - r, s, c) for s, c, r in zip(payload[i], cn0[i], ready[i])) - 1e6
        low = np.max(ready[i] + payload[i] * np.log(2) / cn0[i]) * (1 + 1e-9)
        assert float(best.time_s[i]) == pytest.approx(scipy.optimize.brentq(excess, low, 1e5, xtol=1e-10), rel=1e-6)


def test_min_max_time_in_float32_and_with_absent_users():
    payload, cn0, ready = (jnp.asarray(a, jnp.float32) for a in _random_case(3, 50))
    payload = payload.at[7].set(0.0)
    cn0 = cn0.at[9].set(0.0)
    solve = jax.jit(lambda s, c, r: fdma.min_max_time(s, c, 1e6, r))
    best = solve(payload, cn0, ready)
    assert best.bandwidth_hz[7] == 0.0 and best.bandwidth_hz[9] == 0.0
    assert float(jnp.sum(best.bandwidth_hz)) == pytest.approx(1e6, rel=2e-5)
    served = np.flatnonzero(np.asarray(best.bandwidth_hz))
    ends = ready + payload / link.shannon_rate_bps(best.bandwidth_hz, cn0)
    np.testing.assert_allclose(ends[served], best.time_s, rtol=2e-5)
    nobody = solve(jnp.zeros(50), jnp.ones(50), ready)
    assert nobody.time_s == 0.0 and np.all(nobody.bandwidth_hz == 0.0)
    with pytest.raises(ValueError, match="bandwidth_hz"):
        fdma.min_max_time(payload, cn0, 0.0)


@pytest.mark.parametrize("seed, limited", [(0, False), (1, False), (2, True), (3, True)])
def test_min_energy_is_optimal_against_slsqp(x64, seed, limited):
    payload, gain_to_noise, ready = _random_case(seed)
    gain_to_noise = 1e7 * gain_to_noise**0.1  # 2.8e7 to 6.3e7: no user alone takes most of the band
    time_s, band = 2.0 - ready, 1.5e6
    solve = functools.partial(_min_energy, payload, time_s, gain_to_noise, band)
    unlimited, least = solve(1e9), np.full(4, 1.0)
    best = unlimited
    if limited:
        # A little less than the neediest would use: its bandwidth, and so everyone's, must change.
        limit = 0.97 * float(jnp.max(unlimited.power_w))
        best = solve(limit)
        least = np.asarray(_bandwidth_for_rate(payload / time_s, limit * gain_to_noise))
        assert float(jnp.max(best.power_w)) == pytest.approx(limit, rel=1e-9)
        np.testing.assert_allclose(
            best.power_w * gain_to_noise / best.bandwidth_hz,
            np.expm1(payload * np.log(2) / (time_s * best.bandwidth_hz)),
            rtol=1e-9,
        )
        assert float(jnp.sum(best.energy_j)) > float(jnp.sum(unlimited.energy_j)) * (1 + 1e-6)
    energy = lambda b: np.sum(time_s * b / gain_to_noise * np.expm1(payload * np.log(2) / (time_s * b)))
    # Fractions of the band on a log scale are well conditioned for SLSQP.
    oracle = scipy.optimize.minimize(
        lambda x: np.log(energy(band * np.exp(x))),
        np.full(4, np.log(0.25)),
        method="SLSQP",
        bounds=[(np.log(low / band), 0.0) for low in least],
        constraints={"type": "eq", "fun": lambda x: np.sum(np.exp(x)) - 1.0},
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert bool(best.feasible)
    assert float(jnp.sum(best.energy_j)) == pytest.approx(np.exp(oracle.fun), rel=1e-6)
    assert float(jnp.sum(best.bandwidth_hz)) == pytest.approx(band, rel=1e-9)


def test_min_energy_with_power_limits_keeps_its_digits_in_float32():
    """50 random cases, 0.1 to 8 nats/s/Hz, with a limit that binds, against float64 on the same (rounded) inputs."""
    rng = np.random.default_rng(0)
    payload, time_s = (rng.uniform(*span, (50, 6)).astype(np.float32) for span in ((1e4, 1e6), (0.5, 2.0)))
    gain = (10 ** rng.uniform(6.0, 9.0, (50, 6))).astype(np.float32)
    band = (np.sum(payload / time_s, axis=1) / rng.uniform(0.15, 12.0, 50)).astype(np.float32)
    solve = jax.jit(jax.vmap(fdma.min_energy))
    free = solve(payload, time_s, gain, band, np.full(50, 1e9, np.float32))
    limit = (0.98 * np.max(free.power_w, axis=1)).astype(np.float32)
    ours = solve(payload, time_s, gain, band, limit)
    with jax.enable_x64(True):
        wide = solve(*(jnp.asarray(a, jnp.float64) for a in (payload, time_s, gain, band, limit)))
    np.testing.assert_array_equal(ours.feasible, wide.feasible)
    assert np.sum(wide.feasible) >= 40 and ours.energy_j.dtype == np.float32
    assert np.all(np.any(np.isclose(wide.power_w, limit[:, None], rtol=1e-6), axis=1))
    for name in ("bandwidth_hz", "power_w", "energy_j"):
        np.testing.assert_allclose(getattr(ours, name), getattr(wide, name), rtol=2e-7)


def test_min_energy_reports_what_cannot_be_done():
    hopeless = jax.jit(lambda gain: fdma.min_energy(jnp.asarray([1e6, 1e6]), jnp.ones(2), gain, 1e6, 0.1))(
        jnp.asarray([1e3, 1e8])
    )
    assert not bool(hopeless.feasible) and np.all(np.isfinite(hopeless.energy_j))


def test_admit_most_is_the_largest_feasible_set():
    payload, cn0, ready = _random_case(5, 8)
    time_s = jnp.asarray(1.0 - ready, jnp.float32)
    need = np.asarray(_bandwidth_for_rate(jnp.asarray(payload, jnp.float32) / time_s, jnp.asarray(cn0, jnp.float32)))
    chosen = fdma.admit_most(jnp.asarray(payload, jnp.float32), jnp.asarray(cn0, jnp.float32), 1e6, time_s)
    best = max(sum(s) for s in itertools.product((0, 1), repeat=8) if np.dot(s, np.where(s, need, 0.0)) <= 1e6)
    assert 0 < int(jnp.sum(chosen)) == best < 8


def test_water_filling_reaches_the_rayleigh_capacity(x64):
    count = 20000
    gain = jnp.asarray(-np.log1p(-(np.arange(count) + 0.5) / count))  # exponential quantiles
    watts = power.water_fill(gain, jnp.asarray(float(count)))
    assert float(jnp.sum(watts)) == pytest.approx(count, rel=1e-9) and float(jnp.min(watts)) >= 0.0
    assert float(jnp.mean(jnp.log2(1.0 + watts * gain))) == pytest.approx(1.028539, abs=2e-4)


@pytest.mark.parametrize("total_w", [1e-3, 1.0, 50.0])
def test_water_filling_meets_kkt_and_beats_every_subset(total_w):
    """KKT: one level where power flows, no lower floor where none does. Brute force: every set of channels in use."""
    gain = np.asarray([0.002, 0.001, 3.0, 0.0, 0.7, 0.2, 0.0019], np.float32)
    watts = np.asarray(jax.jit(power.water_fill)(gain, total_w), np.float64)
    with np.errstate(divide="ignore"):
        floor = 1.0 / gain.astype(np.float64)
    used = watts > 0.0
    assert watts.sum() == pytest.approx(total_w, rel=1e-5) and np.all(watts >= 0.0) and watts[3] == 0.0
    level = (watts + floor)[used]
    assert np.ptp(level) <= 1e-4 * total_w + 1e-5 * level.min() and np.all(floor[~used] >= level.min() * (1 - 1e-6))
    best = 0.0
    for size in range(1, 7):
        for subset in itertools.combinations(np.flatnonzero(gain), size):
            split = (total_w + floor[list(subset)].sum()) / size - floor[list(subset)]
            if np.all(split >= 0.0):
                best = max(best, np.sum(np.log1p(split * gain[list(subset)])))
    assert np.sum(np.log1p(watts * gain)) == pytest.approx(best, rel=1e-5)


TRAN = dict(
    cycles=np.array([28, 24, 15, 17, 10])
    * np.array([42285183.155, 55696563.573, 44570296.305, 54280258.952, 56162908.648]),
    max_hz=np.array([1.15687247, 1.49071420, 1.66966444, 1.00974651, 1.71062029]) * 1e9,
    noise_to_gain_w=np.array([5.55452571, 1.76770953, 0.95276861, 0.37525753, 0.14609533]),
)


@functools.partial(jax.jit, static_argnums=1)
def _tran(price, dtype):
    arrays = {name: jnp.asarray(value, dtype) for name, value in TRAN.items()}
    return tdma.joint_energy_time(
        min_hz=0.3e9,
        kappa=1e-28,
        payload_bits=jnp.full(5, 25e3 / np.log(2), dtype),
        bandwidth_hz=1e6,
        min_power_w=0.2,
        max_power_w=1.0,
        price_w=price,
        **arrays,
    )


@pytest.mark.parametrize(
    "price, golden",
    [
        (1.0, [1.023436, 0.506950, 0.274119, 0.271699, 0.476801, 3.209693]),
        (1e-3, [4.455725, 0.042063, 1.158689, 0.231738, 0.123485, 0.376715]),
    ],
)
def test_joint_energy_time_golden(price, golden):
    for enabled, tolerance in ((True, 1e-6), (False, 3e-6)):
        with jax.enable_x64(enabled):
            plan = _tran(price, jnp.float64 if enabled else jnp.float32)
            got = [
                plan.compute.time_s,
                jnp.sum(plan.compute.energy_j),
                jnp.sum(plan.upload.time_s),
                jnp.sum(plan.upload.energy_j),
                plan.theta,
                plan.objective,
            ]
            # The golden values have six decimals.
            np.testing.assert_allclose(np.asarray(got), golden, rtol=tolerance, atol=6e-7)


def test_joint_energy_time_is_optimal_against_scipy(x64):
    price = 0.02
    plan = _tran(price, jnp.float64)
    cycles, ratio, nats = TRAN["cycles"], TRAN["noise_to_gain_w"], 25e3
    cost = lambda t: np.sum(1e-28 * cycles * np.clip(cycles / t, 0.3e9, TRAN["max_hz"]) ** 2) + price * t
    slowest = np.max(cycles / TRAN["max_hz"])
    best = scipy.optimize.minimize_scalar(cost, bounds=(slowest, 10.0), method="bounded", options={"xatol": 1e-10})
    ours = float(jnp.sum(plan.compute.energy_j) + price * plan.compute.time_s)
    assert ours == pytest.approx(min(best.fun, cost(slowest)), rel=1e-6)
    for n in range(5):
        limits = [nats / (1e6 * np.log1p(p / ratio[n])) for p in (1.0, 0.2)]
        upload = lambda tau: tau * (ratio[n] * np.expm1(nats / (tau * 1e6)) + price)
        best = scipy.optimize.minimize_scalar(upload, bounds=limits, method="bounded", options={"xatol": 1e-12})
        assert float(plan.upload.energy_j[n] + price * plan.upload.time_s[n]) == pytest.approx(
            min(best.fun, upload(limits[0]), upload(limits[1])), rel=1e-6
        )
    a = float(jnp.sum(plan.upload.energy_j) + price * jnp.sum(plan.upload.time_s))
    best = scipy.optimize.minimize_scalar(
        lambda th: (a - ours * np.log(th)) / (1 - th), bounds=(1e-6, 1 - 1e-6), method="bounded"
    )
    assert float(plan.objective) == pytest.approx(best.fun, rel=1e-6)


def test_most_clients_is_optimal_and_fedcs_is_not():
    """Brute force over all subsets of 7 clients, 40 instances in one vmap."""
    rng = np.random.default_rng(0)
    ready, upload = rng.uniform(0, 8, (40, 7)).astype(np.float32), rng.uniform(0.5, 4, (40, 7)).astype(np.float32)
    ours, order = jax.jit(jax.vmap(lambda r, u: schedule.most_clients(r, u, 10.0)))(ready, upload)
    greedy, greedy_order = jax.jit(jax.vmap(lambda r, u: schedule.fedcs_greedy(r, u, 10.0)))(ready, upload)
    ends_of = jax.jit(schedule.finish_times)
    worse = 0
    for i in range(40):
        best = 0
        for size in range(1, 8):
            for subset in itertools.combinations(np.argsort(ready[i]), size):  # by rising ready time: optimal order
                now = 0.0
                for k in subset:
                    now = max(now, ready[i, k]) + upload[i, k]
                best = max(best, size if now <= 10.0 else 0)
        assert int(ours[i].sum()) == best
        assert int(greedy[i].sum()) <= best
        worse += int(greedy[i].sum()) < best
        for chosen, sequence in ((ours[i], order[i]), (greedy[i], greedy_order[i])):
            chosen = np.asarray(chosen)
            ends = ends_of(sequence, jnp.where(chosen, ready[i], 0.0), jnp.where(chosen, upload[i], 0.0))
            assert np.all(np.asarray(ends)[chosen] <= 10.0 + 1e-5)
    assert worse > 0
    nobody, _ = schedule.most_clients(jnp.asarray([11.0, 1.0]), jnp.asarray([1.0, jnp.inf]), 10.0)
    assert not np.any(nobody)


@pytest.mark.parametrize("shape", [(5, 8), (6, 6), (8, 5)])
def test_blocks_are_assigned_as_well_as_scipy_does(shape):
    """60 random cases in one jit(vmap), a fifth of the pairs infeasible."""
    rng = np.random.default_rng(1)
    utility = rng.uniform(size=(60,) + shape).astype(np.float32)
    feasible = rng.uniform(size=utility.shape) < 0.8
    blocks = np.asarray(jax.jit(jax.vmap(assignment.assign_blocks))(utility, feasible))
    for worth, allowed, block in zip(utility, feasible, blocks):
        users = np.flatnonzero(block >= 0)
        assert len(set(block[users])) == len(users) and np.all(allowed[users, block[users]])
        best = scipy.optimize.linear_sum_assignment(np.where(allowed, worth, 0.0), maximize=True)
        assert worth[users, block[users]].sum() == pytest.approx(np.where(allowed, worth, 0.0)[best].sum(), abs=1e-5)


def test_blocks_go_only_to_feasible_users():
    utility = jnp.asarray([[3.0, 1.0], [2.0, 0.5], [9.0, 9.0]])
    feasible = jnp.asarray([[True, True], [True, True], [False, False]])
    # User 0 on block 1 and user 1 on block 0 is worth 3.0, the other way round 3.5.
    np.testing.assert_array_equal(assignment.assign_blocks(utility, feasible), [0, 1, -1])
