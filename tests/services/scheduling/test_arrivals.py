"""Rates and burstiness against closed forms."""

import numpy as np
import pytest

from fmfl_jax.services.scheduling.arrivals import Poisson, TwoState


def test_poisson():
    times_s = Poisson(4.0).draw(200_000, np.random.default_rng(0))
    gaps_s = np.diff(times_s, prepend=0.0)
    assert gaps_s.min() >= 0 and gaps_s.mean() == pytest.approx(0.25, rel=0.01)
    assert gaps_s.std() == pytest.approx(0.25, rel=0.01)


def test_two_states_have_their_rate_and_their_dispersion():
    """Variance over mean of counts in long windows: 1 + 2 (r1 - r2)^2 p1 p2 / (rate (q1 + q2)), with rates r,
    stationary shares p and switching rates q (Fischer & Meier-Hellstern, 1993)."""
    process = TwoState(busy_per_s=9.0, calm_per_s=1.0, busy_s=2.0, calm_s=6.0)
    assert process.rate_per_s == 3.0
    times_s = process.draw(400_000, np.random.default_rng(1))
    assert (np.diff(times_s) >= 0).all() and len(times_s) / times_s[-1] == pytest.approx(3.0, rel=0.03)
    counts = np.bincount((times_s // 200.0).astype(int))[:-1]
    expected = 1 + 2 * 8.0**2 * (0.25 * 0.75) / (3.0 * (1 / 2 + 1 / 6))
    assert counts.var() / counts.mean() == pytest.approx(expected, rel=0.25)  # 667 windows; Poisson has 1, not 13
    silent = TwoState(busy_per_s=5.0, calm_per_s=0.0, busy_s=1.0, calm_s=1e6).draw(5, np.random.default_rng(2))
    assert np.isfinite(silent).all()


def test_bad_input():
    with pytest.raises(ValueError, match="rate_per_s must be above 0"):
        Poisson(0.0)
    with pytest.raises(ValueError, match="calm_per_s must be at least 0"):
        TwoState(1.0, -1.0, 1.0, 1.0)
