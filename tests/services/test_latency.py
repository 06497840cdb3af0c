"""Output lengths and the queue: goldens, quadrature and samples, and a fit that knows what was cut."""

import numpy as np
import pytest
from scipy import integrate, stats

from fmfl_jax.services import latency as la

LENGTHS = la.LogNormal(4.0, 1.0)


def test_goldens():
    service = la.service_time(LENGTHS, prefill_s=0.1, token_s=0.02)
    assert service.mean_s == pytest.approx(1.900343, abs=5e-7)
    assert service.squared_cv == pytest.approx(1.542201, abs=5e-7)
    assert 0.2 * service.mean_s == pytest.approx(0.380069, abs=5e-7)
    assert la.mg1_wait_s(service, arrivals_per_s=0.2) == pytest.approx(1.480914, abs=5e-7)
    for limit, cut, wait in ((256, 0.0612, 0.722809), (128, 0.1971, 0.370316)):
        service = la.service_time(LENGTHS, prefill_s=0.1, token_s=0.02, limit=limit)
        assert service.cut_share == pytest.approx(cut, abs=5e-5)
        assert la.mg1_wait_s(service, arrivals_per_s=0.2) == pytest.approx(wait, abs=5e-7)


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("mu, sigma, limit", [(4.0, 1.0, 100.0), (2.0, 0.3, 7.0), (1.0, 1.5, 400.0)])
def test_clipped_moments_by_quadrature(power, mu, sigma, limit):
    found = la.clipped_moment(la.LogNormal(mu, sigma), power, limit)
    integrand = lambda z: min(np.exp(mu + sigma * z), limit) ** power * stats.norm.pdf(z)
    edge = (np.log(limit) - mu) / sigma
    value = sum(integrate.quad(integrand, *ends)[0] for ends in ((-12, edge), (edge, 12)))
    assert found == pytest.approx(value, rel=1e-7)


def test_closed_forms_at_the_ends():
    assert la.clipped_moment(LENGTHS, 2, 1e12) == pytest.approx(la.clipped_moment(LENGTHS, 2), rel=1e-9)
    constant = la.LogNormal(np.log(50.0), 0.0)
    assert la.clipped_moment(constant, 2, 20.0) == pytest.approx(400)
    service = la.service_time(constant, prefill_s=0.5, token_s=0.01, limit=64)
    assert service.squared_cv == pytest.approx(0, abs=1e-12) and service.cut_share == 0
    # M/D/1 at load .6 with mean service 1: half of M/M/1's 1.5
    assert la.mg1_wait_s(service, arrivals_per_s=0.6) == pytest.approx(0.75)
    assert la.mg1_wait_s(service, arrivals_per_s=1.0) == np.inf


def test_fits_recover_what_was_drawn_cut_or_not():
    draws = np.random.default_rng(0).lognormal(4.0, 1.0, size=20_000)
    whole = la.fit_log_normal(draws)
    assert whole.mu == pytest.approx(np.log(draws).mean()) and whole.sigma == pytest.approx(np.log(draws).std())
    cut = la.fit_log_normal(np.minimum(draws, 60), limit=60)  # 46 % are cut
    assert cut.mu == pytest.approx(4.0, abs=0.03) and cut.sigma == pytest.approx(1.0, abs=0.03)
    assert la.fit_log_normal(np.minimum(draws, 60)).sigma < 0.8  # at their word
    # the likelihood's maximum: no neighbour is better
    log = np.log(np.minimum(draws, 60))
    known = log[log < np.log(60)]

    def likelihood(mu, sigma):
        edge = stats.norm.logsf(np.log(60), mu, sigma) * (len(log) - len(known))
        return stats.norm.logpdf(known, mu, sigma).sum() + edge

    best = likelihood(cut.mu, cut.sigma)
    assert all(best > likelihood(cut.mu + a, cut.sigma + b) for a, b in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)))


def test_bad_input_is_one_line():
    with pytest.raises(ValueError, match="lengths must be positive"):
        la.fit_log_normal([3, 0])
    with pytest.raises(ValueError, match="all 2 lengths reach limit=5"):
        la.fit_log_normal([5, 6], limit=5)
    with pytest.raises(ValueError, match="sigma must be at least 0"):
        la.LogNormal(1.0, -1.0)
    with pytest.raises(ValueError, match="prefill_s"):
        la.service_time(LENGTHS, prefill_s=-1, token_s=0.1)
