"""Rates, block errors, HARQ and the time-resolved transfer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from fmfl_jax.wireless import link, transfer, transport_block


def test_closed_forms_of_rayleigh_fading():
    with jax.enable_x64(True):
        capacity = link.rayleigh_capacity(jnp.asarray([1.0, 10.0, 100.0]))
        np.testing.assert_allclose(capacity, [0.860347, 2.906515, 5.884048], atol=6e-7)
        assert float(link.rayleigh_outage(2.0, 10.0)) == pytest.approx(0.259182, abs=5e-7)
        outage = link.chase_outage(2.0, jnp.asarray(10.0), jnp.arange(1, 5))
        np.testing.assert_allclose(outage, [0.2592, 0.0369, 0.0036, 0.00027], rtol=0.02)
        np.testing.assert_allclose(link.rayleigh_capacity(jnp.asarray([0.0, 1e-6])), [0.0, 1e-6 / np.log(2)], rtol=3e-6)
        # Rate 0 is never in outage, not even without a signal; any other rate is, then.
        rates, snrs = jnp.asarray([0.0, 0.0, 2.0]), jnp.asarray([0.0, 1.0, 0.0])
        np.testing.assert_array_equal(link.rayleigh_outage(rates, snrs), [0.0, 0.0, 1.0])
        np.testing.assert_array_equal(link.chase_outage(rates, snrs, 2), [0.0, 0.0, 1.0])
    assert float(link.rayleigh_outage(0, 0)) == 0.0 == float(link.chase_outage(0, 0, 1))


def _snr_db_at_10_percent(modulation_order, code_rate_1024, gap_db):
    symbols = 2000.0 / (modulation_order * code_rate_1024 / 1024.0)
    error = lambda db: float(link.block_error_rate(10.0 ** (db / 10.0), symbols, 2000.0, 10.0 ** (gap_db / 10.0))) - 0.1
    return scipy.optimize.brentq(error, -10.0, 30.0, xtol=1e-4)


def test_block_error_model_against_the_measured_ldpc_chain():
    """Code block of 2000 bits, 10 % error. The facts' fifth row is code rate 910, index 27 of the table (there called
    26)."""
    rows = [(2, 308), (2, 679), (4, 553), (6, 567), (6, 910)]
    bare = [-2.67, 1.98, 5.61, 9.77, 16.20]
    measured = [-1.70, 3.22, 7.06, 11.74, 17.62]
    with jax.enable_x64(True):
        np.testing.assert_allclose([_snr_db_at_10_percent(*row, 0.0) for row in rows], bare, atol=6e-3)
        fitted = [_snr_db_at_10_percent(*row, link.IMPLEMENTATION_GAP_DB[row[0]]) for row in rows]
    np.testing.assert_allclose(fitted, measured, atol=0.29)
    thresholds = link.mcs_thresholds_db(2000.0 / (2 * 308 / 1024.0))
    assert thresholds[4] == pytest.approx(fitted[0], abs=1e-3)


def test_mcs_selection_is_the_table():
    thresholds = link.mcs_thresholds_db(1000.0)
    assert link.MCS_EFFICIENCY.shape == (29,) and link.MCS_EFFICIENCY[28] == pytest.approx(5.5547, abs=1e-4)
    snr_db = jnp.asarray([-30.0, *(np.maximum.accumulate(thresholds) + 1e-3)])
    efficiency, gap = link.select_mcs(10.0 ** (snr_db / 10.0), thresholds)
    assert float(efficiency[0]) == 0.0
    reached = np.asarray(
        [
            link.MCS_EFFICIENCY[np.flatnonzero(np.maximum.accumulate(thresholds) <= s)[-1]]
            for s in np.asarray(snr_db[1:])
        ]
    )
    np.testing.assert_allclose(efficiency[1:], reached, rtol=1e-5)
    assert float(gap[-1]) == pytest.approx(10**0.1695, rel=1e-5)


def test_long_transport_blocks_are_cut_into_code_blocks():
    one = link.transport_block_error(jnp.float32(4.0), jnp.float32(4000.0), 8000.0, 1.0)
    three = link.transport_block_error(jnp.float32(4.0), jnp.float32(12000.0), 24000.0, 1.0)
    assert float(three) == pytest.approx(1.0 - (1.0 - float(one)) ** 3, rel=1e-4)


def test_power_control_and_noise():
    power = link.uplink_power_dbm(
        jnp.asarray([80.0, 130.0]), jnp.asarray([10.0, 10.0]), max_dbm=23.0, p0_dbm=-90.0, alpha=0.8
    )
    np.testing.assert_allclose(power, [-16.0, 23.0], atol=1e-5)
    cn0 = link.carrier_to_noise_hz(jnp.asarray(23.0), jnp.asarray(-100.0), 5.0, 3.0)
    assert float(cn0) == pytest.approx(10 ** ((23 - 100 + 174 - 8) / 10), rel=1e-5)


_send = jax.jit(transfer.slotted_transfer, static_argnums=6)


def _transfer(rate, harq, cn0_hz, payload_bits=2e6, limit_s=10.0):
    """Of 300 users without a line of sight, numpy arrays [300]."""
    each = (np.full(300, value, np.float32) for value in (payload_bits, 1e6, cn0_hz, 0.0, limit_s))
    return jax.device_get(_send(jax.random.key(0), *each, transfer.SlotModel(1e-3, 200.0, rate, 0.0, harq, 4, 1000.0)))


def test_time_resolved_shannon_transfer_reaches_the_ergodic_capacity():
    sent = _transfer("shannon", "type1", 1e7)
    assert np.all(sent.completed)
    rate = 2e6 / sent.time_s
    capacity = 1e6 * 2.906515
    # A transfer ends with a whole slot: half a slot of 700 on average.
    assert abs(rate.mean() / capacity - 1.0) < 0.003 + 4.0 * rate.std() / capacity / np.sqrt(300)


def test_harq_resends_what_is_lost_and_chase_needs_fewer_slots():
    plain, chase = _transfer("mcs", "type1", 1e7), _transfer("mcs", "chase", 1e7)
    for sent in (plain, chase):
        assert np.all(sent.completed)
        np.testing.assert_array_less(sent.airtime_s, sent.time_s + 1e-6)
        assert 0.02 < float(np.sum(sent.block_errors) / np.sum(sent.blocks)) < 0.6
    assert float(np.mean(chase.time_s)) < float(np.mean(plain.time_s))


def test_transfer_stops_at_its_limit_and_survives_no_signal():
    starved = _transfer("mcs", "type1", 1e2, limit_s=0.3)
    assert not np.any(starved.completed) and np.all(starved.airtime_s == 0.0)
    np.testing.assert_allclose(starved.time_s, 0.3, rtol=1e-6)
    nothing = _transfer("shannon", "type1", 1e7, payload_bits=0.0)
    assert np.all(nothing.completed) and np.all(nothing.time_s == 0.0)
    with pytest.raises(ValueError, match="harq"):
        _transfer("mcs", "type3", 1e7)


def test_one_packet_is_chens_error_rate():
    snr = jnp.full(40000, 5.0)
    arrived, probability = transfer.one_packet(jax.random.key(0), snr, 1.08)
    p = np.exp(-1.08 / 5.0)
    np.testing.assert_allclose(probability[0], p, rtol=1e-6)
    assert abs(np.mean(arrived) - p) < 4.0 * np.sqrt(p * (1 - p) / 40000)
    assert float(link.packet_error_rate(jnp.float32(0.0), 1.0)) == 1.0


GOLDEN = [
    (2, 120, 178, 24),
    (2, 251, 90, 24),
    (2, 120, 54442, 6408),
    (2, 120, 48394, 5640),
    (2, 193, 410706, 77928),
    (2, 251, 280754, 69744),
    (4, 340, 72, 24),
    (2, 379, 36, 24),
    (4, 658, 52, 32),
    (6, 517, 144, 72),
    (2, 602, 1890, 1128),
    (6, 567, 4908, 2728),
    (2, 526, 7580, 3840),
    (2, 379, 11504, 4224),
    (4, 434, 38124, 16136),
    (6, 822, 23208, 18432),
    (4, 658, 434628, 278776),
    (4, 658, 596920, 385272),
]


def test_transport_block_sizes_are_those_of_38214():
    """(Qm, code rate x 1024, coded bits) -> bits, by Sionna 2.2's calculate_tb_size; every branch of 5.1.3.2."""
    rows = np.asarray(GOLDEN)
    info, low = rows[:, 2] * (rows[:, 1] / 1024.0), rows[:, 1] <= 256
    bits_of = jax.jit(transport_block.transport_block_bits)
    sizes = bits_of(jnp.asarray(info, jnp.float32), jnp.asarray(low))
    np.testing.assert_array_equal(sizes, rows[:, 3])
    # All of the table: N_info = 24 to 3824 at code rate 1/2, their sum by Sionna too.
    small = np.asarray(bits_of(np.arange(24.0, 3825.0, dtype=np.float32), False), int)
    assert len(set(small)) == 93 and small.sum() == 7388144
    # A block of each MCS, and the rate that a plan counts on: the same sizes.
    symbols = rows[:, 2] / rows[:, 0]
    by_mcs = np.asarray(jax.jit(link.mcs_block_bits)(jnp.asarray(symbols, jnp.float32)))
    which = [np.flatnonzero(link.MCS_EFFICIENCY == q * r / 1024.0)[0] for q, r, _, _ in rows]
    np.testing.assert_array_equal(by_mcs[which, np.arange(len(rows))], rows[:, 3])
    thresholds = link.mcs_thresholds_db(1000.0)
    rate_bps = jax.jit(lambda bandwidth_hz, snr: link.mcs_rate_bps(bandwidth_hz, snr, thresholds, 1e-3))
    for mcs in (1, 28):
        snr = jnp.full(len(rows), 10.0 ** ((thresholds[mcs] + 1e-3) / 10.0))
        rate = rate_bps(jnp.asarray(symbols * 1e3, jnp.float32), snr)
        np.testing.assert_allclose(rate, 0.9e3 * by_mcs[mcs], rtol=1e-6)


def test_a_slot_carries_one_transport_block():
    sent = _transfer("mcs", "type1", 1e15, payload_bits=1e6)
    size = float(link.mcs_block_bits(jnp.asarray(1000.0))[28])
    assert size != 1000.0 * link.MCS_EFFICIENCY[28] and not np.any(sent.block_errors)
    np.testing.assert_array_equal(sent.blocks, np.ceil(1e6 / size))
