"""GNMax: the cost against closed forms of the Gaussian mechanism, and answers that follow the votes."""

import numpy as np
import pytest
from scipy import optimize, stats

from fmfl_jax.services import pate


def test_votes_and_answers():
    labels = np.asarray([[0, 1, 2], [0, 1, -1], [2, 0, -1]])
    votes = pate.vote_counts(labels, 3)
    np.testing.assert_array_equal(votes, [[2, 0, 1], [1, 2, 0], [0, 0, 1]])
    np.testing.assert_array_equal(pate.noisy_argmax(votes, sigma=0.0, rng=0), [0, 1, 2])
    with pytest.raises(ValueError, match="teacher_labels"):
        pate.vote_counts([[3]], 3)
    with pytest.raises(ValueError, match="votes must be finite"):
        pate.noisy_argmax([[np.nan, 1]], sigma=1.0, rng=0)


def test_the_right_answer_comes_as_often_as_the_gaussian_says():
    n, gap, sigma = 20_000, 3.0, 2.0  # two classes: right where N(0, 2 sigma^2) > -gap
    answers = pate.noisy_argmax(np.tile([10.0 + gap, 10.0], (n, 1)), sigma=sigma, rng=0)
    expected = stats.norm.cdf(gap / (np.sqrt(2) * sigma))
    assert (answers == 0).mean() == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / n))


@pytest.mark.parametrize("num_answers, sigma", [(1, 5.0), (100, 40.0)])
def test_cost_against_the_exact_gaussian_and_the_data_independent_rdp_bound(num_answers, sigma):
    delta = 1e-5
    spent = pate.gnmax_privacy(num_answers, sigma=sigma, delta=delta)
    # delta(epsilon) of noise sigma on sensitivity sqrt(2 answers), Balle, Wang 2018
    ratio = np.sqrt(2 * num_answers) / sigma
    at = lambda e: stats.norm.cdf(ratio / 2 - e / ratio) - np.exp(e) * stats.norm.cdf(-ratio / 2 - e / ratio)
    exact = optimize.brentq(lambda e: at(e) - delta, 0, 20)
    assert spent.epsilon_pld == pytest.approx(exact, abs=2e-3)
    orders = np.arange(1.01, 200, 0.01)  # alpha / sigma^2 an answer, Mironov's conversion
    loose = np.min(num_answers * orders / sigma**2 + np.log(1 / delta) / (orders - 1))
    assert exact < spent.epsilon_rdp <= loose
