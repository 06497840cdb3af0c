"""A ring's all-reduce against a loop over its messages, and the golden token over a radio."""

import numpy as np
import pytest

from fmfl_jax.services.tensor_parallel import Best, Interconnect, best_num_devices, ring_all_reduce_s, token_s

RADIO, BOX = Interconnect(rate_bps=100e6, latency_s=1e-3), Interconnect(rate_bps=400e9, latency_s=5e-6)
SEVEN_B = dict(num_layers=32, activation_bytes=16384)


def test_golden_510_ms_a_token_over_a_radio():
    assert ring_all_reduce_s(4, 16384, RADIO) == pytest.approx(7.966e-3, abs=5e-7)
    assert token_s(one_device_s=0.0, num_devices=4, link=RADIO, **SEVEN_B) == pytest.approx(0.510, abs=5e-4)
    assert token_s(one_device_s=0.06, num_devices=1, link=RADIO, **SEVEN_B) == 0.06


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_a_ring_by_its_messages(n):
    """Chunks go round: n - 1 steps of sums, n - 1 of results; at the end every device has the whole sum."""
    rng = np.random.default_rng(n)
    values, seconds = rng.normal(size=(n, n)), 0.0  # device, chunk
    total, chunk_bytes = values.sum(axis=0), 1000 / n
    for step in range(2 * (n - 1)):
        sent = [(d, (d - step) % n) for d in range(n)]
        moved = {(d, c): values[d, c] for d, c in sent}
        for (d, c), value in moved.items():
            values[(d + 1) % n, c] = value + (values[(d + 1) % n, c] if step < n - 1 else 0.0)
        seconds += RADIO.latency_s + 8 * chunk_bytes / RADIO.rate_bps
    np.testing.assert_allclose(values, np.broadcast_to(total, (n, n)))
    assert ring_all_reduce_s(n, 1000, RADIO) == pytest.approx(seconds)


def test_inside_a_box_it_pays_and_over_a_radio_not():
    one = dict(one_device_s=0.06, **SEVEN_B)
    assert best_num_devices([8, 1, 2, 4], link=BOX, **one).num_devices == 8
    assert best_num_devices([1, 2, 4, 8], link=RADIO, **one) == Best(1, 0.06)
    with pytest.raises(ValueError, match="counts is empty"):
        best_num_devices([], link=BOX, **one)
    with pytest.raises(ValueError, match="rate_bps must be above 0"):
        Interconnect(rate_bps=0.0, latency_s=0.0)
    with pytest.raises(ValueError, match="num_devices must be at least 1"):
        ring_all_reduce_s(0, 1.0, BOX)
