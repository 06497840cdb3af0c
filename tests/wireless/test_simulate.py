"""Rounds over networks: timelines, deadlines, probabilities, energy, presets and bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.wireless import compute, network, planning, presets, round_time, simulate

LORA_BITS = 8.0 * 8388608  # r 8 on q and v of LLaMA-7B in bf16


@functools.cache
def _compiled(config):
    return jax.jit(functools.partial(simulate.simulate_round, config))


_init = jax.jit(network.init_network, static_argnums=0)
_rings = jax.jit(presets.rings_20, static_argnums=0)
_base_delivery_s = jax.jit(simulate.base_delivery_s, static_argnums=0)
_downlink_s = jax.jit(simulate.downlink_s, static_argnums=0)


def _round(config, state=None, seed=1, bits=1e6, downlink_bits=0.0, compute_s=0.0, compute_j=0.0, selected=None):
    """(the network's state, the outcome) as numpy arrays."""
    n = config.num_clients
    of_each = lambda value: np.broadcast_to(np.asarray(value, np.float32), (n,))
    played = _compiled(config)(
        _init(config, jax.random.key(0)) if state is None else state,
        jax.random.key(seed),
        of_each(bits),
        np.float32(downlink_bits),
        of_each(compute_s),
        of_each(compute_j),
        selected=np.ones(n, bool) if selected is None else np.asarray(selected),
    )
    return jax.device_get(played)


def _check(outcome):
    """What must hold of any round."""
    for name, value in outcome._asdict().items():
        assert np.all(np.isfinite(value)), name
    assert np.all(outcome.finish_s <= outcome.latency_s + 1e-6)
    assert not np.any(outcome.delivered & ~outcome.scheduled)
    assert np.all((outcome.delivery_probability > 0) | ~outcome.delivered)
    assert np.all(outcome.delivery_probability <= 1.0)
    np.testing.assert_allclose(outcome.energy_j, outcome.compute_j + outcome.uplink_j, rtol=1e-6)
    spent = outcome.downlink_s + outcome.compute_s + outcome.wait_s + outcome.uplink_s
    np.testing.assert_allclose(spent[outcome.scheduled], outcome.finish_s[outcome.scheduled], rtol=1e-4, atol=1e-4)


def test_worked_example_of_the_facts():
    config = presets.facts_20()
    state = _rings(config, jax.random.key(0))
    after, outcome = _round(config, state, bits=LORA_BITS, downlink_bits=8.0 * 3.7e9)
    _check(outcome)
    assert np.all(outcome.delivered) and np.all(outcome.delivery_probability == 1.0)
    assert float(outcome.downlink_s[0]) == pytest.approx(146.4, rel=2e-3)  # int4 base at 202 Mbit/s
    assert float(outcome.latency_s - outcome.downlink_s[0]) == pytest.approx(7.67, rel=2e-3)
    np.testing.assert_allclose(outcome.uplink_j, outcome.uplink_s * 10**-0.7, rtol=1e-5)
    assert float(_base_delivery_s(config, state, 8.0 * 13.5e9)[0]) == pytest.approx(534.4, rel=2e-3)
    assert int(after.round) == 1 and float(after.time_s) == float(outcome.latency_s)


def test_deadline_is_met_by_the_most_and_a_hopeless_one_delivers_nothing():
    config = presets.facts_20(deadline_s=4.0)
    state = _rings(config, jax.random.key(0))
    _, outcome = _round(config, state, bits=LORA_BITS, compute_s=1.0, compute_j=3.0)
    _check(outcome)
    heard = np.asarray(outcome.delivered)
    # Sequentially nearest: less bandwidth for the same bits.
    assert 0 < heard.sum() < 20 and np.all(np.diff(heard.astype(int)) <= 0)
    assert np.all(np.asarray(outcome.energy_j)[~heard] == 0.0)  # nobody works for a round it cannot make
    _, hopeless = _round(config, state, bits=1e12)
    _check(hopeless)
    assert not np.any(hopeless.delivered) and float(hopeless.latency_s) == 4.0
    assert np.all(hopeless.energy_j == 0.0)


def test_late_clients_are_cut_off_at_the_deadline():
    config = presets.facts_20(deadline_s=4.0, scheduler="equal")
    state = _rings(config, jax.random.key(0))
    slow = np.where(np.arange(20) == 0, 10.0, 0.5)
    _, outcome = _round(config, state, bits=2e7, compute_s=slow, compute_j=np.full(20, 10.0))
    _check(outcome)
    assert not outcome.delivered[0] and float(outcome.latency_s) == 4.0
    assert float(outcome.compute_s[0]) == 4.0 and float(outcome.compute_j[0]) == pytest.approx(4.0)
    assert float(outcome.uplink_j[0]) == 0.0 and bool(outcome.delivered[1])


def test_cohort_first_arrivals_and_unselected_clients():
    config = presets.facts_20(scheduler="equal", wait_for=3)
    state = _rings(config, jax.random.key(0))
    selected = np.arange(20) % 2 == 0
    _, outcome = _round(config, state, bits=2e7, selected=selected)
    _check(outcome)
    np.testing.assert_array_equal(outcome.delivered, selected & (np.arange(20) < 6))
    np.testing.assert_allclose(outcome.bandwidth_hz[selected], 2e6, rtol=1e-6)
    assert np.all(outcome.energy_j[~selected] == 0.0)


@pytest.mark.parametrize("downlink", ["broadcast", "unicast"])
def test_a_downlink_gives_up_on_a_client_out_of_reach(downlink):
    config = presets.facts_20(downlink=downlink, scheduler="equal")
    state = _rings(config, jax.random.key(0))
    far = state._replace(motion=jax.tree.map(lambda a: a.at[3].set(jnp.asarray([1e6, 0.0])), state.motion))
    others = np.arange(20) != 3
    _, outcome = _round(config, far, bits=1e6, downlink_bits=1e6)
    _check(outcome)
    np.testing.assert_array_equal(outcome.delivered, others)
    assert float(outcome.energy_j[3]) == 0.0 and not outcome.scheduled[3]
    # Nobody waits for it: the round is that of the other nineteen.
    _, without = _round(config, state, bits=1e6, downlink_bits=1e6, selected=others)
    np.testing.assert_array_equal(outcome.latency_s, without.latency_s)
    np.testing.assert_array_equal(np.isinf(_base_delivery_s(config, far, 1e9)), ~others)
    # What cannot be there by the deadline is an outage too, and keeps no one else from being served.
    rate = network.downlink_rate_bps(config, network.channel(config, state).path_gain_db)
    share = 1.0 if downlink == "broadcast" else 10.0
    hurried = dataclasses.replace(config, deadline_s=float(1e8 * share / rate[9]) * 1.0001)
    down = _downlink_s(hurried, state, 1e8)
    np.testing.assert_array_equal(np.isfinite(down), np.arange(20) < 10)
    assert float(np.max(down[:10])) == pytest.approx(hurried.deadline_s, rel=1e-3)


def test_min_energy_uses_the_time_it_has():
    state = _rings(presets.facts_20(), jax.random.key(0))
    fast = _round(presets.facts_20(), state, bits=LORA_BITS)[1]
    thrifty = _round(presets.facts_20(deadline_s=20.0, scheduler="min_energy"), state, bits=LORA_BITS)[1]
    _check(thrifty)
    assert np.all(thrifty.delivered) and float(thrifty.latency_s) == pytest.approx(20.0, rel=1e-4)
    assert np.sum(thrifty.energy_j) < 0.3 * np.sum(fast.energy_j)


@pytest.mark.parametrize("scheduler", ["fifo", "most_clients"])
def test_tdma_uploads_follow_one_another(scheduler):
    config = presets.tran(scheduler=scheduler, deadline_s=2.0)
    _, outcome = _round(config, bits=25e3 / np.log(2), compute_s=np.arange(5.0) * 0.05)
    _check(outcome)
    sent = np.flatnonzero(outcome.uplink_s > 0.0)
    order = sent[np.argsort(outcome.finish_s[sent])]
    start = outcome.finish_s - outcome.uplink_s
    assert np.all(np.asarray(start[order[1:]]) >= np.asarray(outcome.finish_s[order[:-1]]) - 1e-4)
    assert 0 < int(outcome.delivered.sum()) < 5


def test_whole_blocks_finish_as_early_as_whole_blocks_can():
    """min_time_blocks against exhaustive search: 3 users, 7 blocks."""
    cn0, bits, ready = jnp.asarray([3e5, 2e6, 4e7]), jnp.asarray([1e5, 3e5, 6e5]), jnp.asarray([0.0, 0.2, 0.1])
    blocks = planning.min_time_blocks(bits, cn0, jnp.ones(3, bool), 7, 180e3, ready)
    end = lambda k: float(jnp.max(ready + bits / (k * 180e3 * jnp.log2(1 + cn0 / (k * 180e3)))))
    every = [
        end(jnp.asarray([a, b, c], jnp.float32))
        for a in range(1, 6)
        for b in range(1, 7 - a)
        for c in range(1, 8 - a - b)
    ]
    assert float(jnp.sum(blocks)) <= 7.0
    assert end(blocks) == pytest.approx(min(every), rel=1e-5)


def test_packet_probability_matches_the_frequency_of_delivery():
    """Chen's network: more users than blocks, packet errors; 400 rounds in one vmap, four standard errors."""
    config = presets.chen(scheduler="equal")
    state = _init(config, jax.random.key(0))
    zeros = jnp.zeros(15)
    play = lambda key: simulate.simulate_round(config, state, key, jnp.full(15, 1e4), 1e4, zeros, zeros)[1]
    rounds = jax.jit(jax.vmap(play))(jax.random.split(jax.random.key(3), 400))
    assert np.all(rounds.scheduled.sum(axis=1) <= 12)
    # Without a block a round's probability is 0: average what the rounds report.
    expected = jnp.mean(
        jnp.where(rounds.scheduled, rounds.delivery_probability, jnp.nan), axis=0, where=rounds.scheduled
    )
    frequency = jnp.mean(rounds.delivered.astype(jnp.float32), axis=0)
    assert np.all(np.abs(frequency - expected) < 4.0 * np.sqrt(expected * (1 - expected) / 400) + 1e-3)


def test_hungarian_network_reports_finite_rounds_and_respects_the_energy_limit():
    config = presets.chen()
    _, outcome = _round(config, bits=1e4, downlink_bits=1e4, compute_j=1e-3)
    _check(outcome)
    assert 0 < int(outcome.scheduled.sum()) <= 12 and np.all(outcome.energy_j <= 3e-3)
    _, exhausted = _round(config, bits=1e4, downlink_bits=1e4, compute_j=4e-3)
    assert not np.any(exhausted.scheduled)


def test_time_resolved_round_with_deadline_samples_its_probabilities():
    config = presets.umi_20(deadline_s=1.5, harq="type1", probability_samples=15)
    _, outcome = _round(config, bits=3e6)
    _check(outcome)
    assert 0 < int(outcome.delivered.sum()) < 20
    assert 0.0 < np.max(outcome.block_error_rate) < 0.5
    again = _round(config, bits=3e6)[1]
    jax.tree.map(np.testing.assert_array_equal, outcome, again)


def test_cells_are_independent_copies():
    """Two cells of three clients run as two networks of three would: each splits its own band."""
    two = presets.facts_20(num_clients=6, num_cells=2, scheduler="equal")
    state = _rings(two, jax.random.key(0))
    _, outcome = _round(two, state, bits=1e7)
    for cell in (0, 1):
        one = presets.facts_20(num_clients=3, scheduler="equal")
        here = slice(3 * cell, 3 * cell + 3)
        alone = _init(one, jax.random.key(0))
        alone = alone._replace(motion=jax.tree.map(lambda a: a[here], state.motion))
        np.testing.assert_allclose(_round(one, alone, bits=1e7)[1].uplink_s, outcome.uplink_s[here], rtol=1e-5)


def test_users_at_distance_zero_and_without_payload():
    config = presets.facts_20(num_clients=4, scheduler="equal")
    state = _rings(config, jax.random.key(0))
    state = state._replace(motion=jax.tree.map(jnp.zeros_like, state.motion))
    _check(_round(config, state)[1])
    _, empty = _round(config, state, bits=0.0)
    _check(empty)
    assert np.all(empty.delivered) and float(empty.latency_s) == 0.0


@pytest.mark.parametrize(
    "field, value",
    [
        ("bandwidth_hz", 0.0),
        ("bandwidth_hz", -1.0),
        ("tx_power_dbm", -np.inf),
        ("deadline_s", 0.0),
        ("num_clients", 0),
        ("cell", "triangle"),
        ("scheduler", "fifo"),
        ("max_uplink_s", np.inf),
        ("max_downlink_s", np.inf),
        ("wait_for", 21),
        ("min_distance_m", 600.0),
    ],
)
def test_bad_configurations_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field if field != "tx_power_dbm" else "tx_power_dbm must be a finite number"):
        presets.facts_20(**{field: value})


def test_bad_round_inputs_are_refused():
    config = presets.facts_20()
    state = network.init_network(config, jax.random.key(0))
    with pytest.raises(ValueError, match="uplink_bits must have shape"):
        simulate.simulate_round(config, state, jax.random.key(0), jnp.ones(3), 0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="compute_s must be >= 0"):
        simulate.simulate_round(config, state, jax.random.key(0), jnp.ones(20), 0.0, jnp.full(20, jnp.nan), 0.0)


def test_stragglers_closed_form():
    times = 1.0 + jax.random.exponential(jax.random.key(0), (20000, 20)) / 2.0
    last = jnp.max(times, axis=1)
    expected_fifth = 1.0 + sum(1.0 / i for i in range(16, 21)) / 2.0  # a + (H_n - H_{n-k}) / mu
    assert abs(last.mean() - 2.79887) < 4.0 * last.std() / np.sqrt(20000)
    fifth = jax.vmap(lambda t: round_time.kth_smallest(t, 5))(times)
    assert abs(fifth.mean() - expected_fifth) < 4.0 * fifth.std() / np.sqrt(20000)


def test_compute_models_and_memory():
    assert float(compute.cycles_time_s(20.0, 1e8, 2e9)) == 1.0
    assert float(compute.cycles_energy_j(20.0, jnp.float32(1e8), jnp.float32(2e9))) == pytest.approx(0.8, rel=1e-6)
    lora = dict(base_params=6.6e9, trainable_params=4.2e6)
    fp16 = compute.Workload(weight_bytes=13.5e9, **lora)
    int4 = compute.Workload(weight_bytes=3.7e9, rematerialize=True, **lora)
    assert compute.training_flops_per_token(fp16) == 4 * 6.6e9 + 6 * 4.2e6
    assert compute.training_flops_per_token(int4) == 6 * 6.6e9 + 8 * 4.2e6
    full = compute.Workload(base_params=6.6e9, trainable_params=0.0, weight_bytes=13.5e9)
    assert compute.training_flops_per_token(full) == 6 * 6.6e9
    devices = compute.stack_devices([compute.phone(), compute.vehicle(), compute.edge_box()])
    np.testing.assert_array_equal(compute.fits(devices, compute.training_memory_bytes(fp16)), [False, True, True])
    np.testing.assert_array_equal(compute.fits(devices, compute.training_memory_bytes(int4)), [True, True, True])
    seconds = compute.training_time_s(devices, fp16, jnp.float32(1024.0), jnp.float32(10.0))
    assert float(seconds[0]) == pytest.approx(10 * 1024 * compute.training_flops_per_token(fp16) / 1e12, rel=1e-5)
    with pytest.raises(ValueError, match="memory_bytes"):
        compute.DeviceClass(
            name="x",
            peak_flops=1.0,
            utilization=0.5,
            memory_bandwidth_bytes_s=1.0,
            memory_bytes=0.0,
            active_power_w=1.0,
        )
