"""Calibration by hand and by brute force."""

import numpy as np
import pytest

from fmfl_jax.services import calibration

ROWS = np.log([[0.8, 0.2], [0.6, 0.4]])


def test_priors_by_hand():
    # The mean of the two rows is (.7, .3): 8/7 against 2/3, 6/7 against 4/3.
    np.testing.assert_allclose(np.exp(calibration.batch(ROWS)), [[12 / 19, 7 / 19], [9 / 23, 14 / 23]], rtol=1e-12)
    null = np.log([[0.9, 0.1], [0.5, 0.5]]) - 7.0  # an offset of a row changes nothing; the mean is (.7, .3) again
    np.testing.assert_allclose(calibration.contextual(ROWS, null), calibration.batch(ROWS), rtol=1e-12)
    np.testing.assert_allclose(calibration.raw(ROWS - 1000.0), ROWS, rtol=1e-9)
    assert calibration.raw(np.float32([[-2000.0, 0.0]])).tolist() == [[-2000.0, 0.0]]  # float64, nothing underflows


def test_temperature_is_the_best_of_a_grid():
    rng = np.random.default_rng(0)
    truth = calibration.raw(rng.normal(size=(4000, 3)))
    labels = np.asarray([rng.choice(3, p=np.exp(row)) for row in truth])
    fitted = calibration.fit_temperature(3 * truth, labels)  # three times too sure
    assert abs(fitted - 3) < 0.25
    losses = [calibration.nll(calibration.with_temperature(3 * truth, fitted * f), labels) for f in (0.99, 1, 1.01)]
    assert losses[1] < min(losses[0], losses[2]) and losses[1] < calibration.nll(3 * truth, labels)
    assert calibration.accuracy(calibration.with_temperature(truth, 5.0), labels) == calibration.accuracy(truth, labels)
    np.testing.assert_allclose(np.exp(calibration.with_temperature(ROWS[:1], 0.5)), [[16 / 17, 1 / 17]])
    assert 1e-3 < calibration.fit_temperature(ROWS, [0, 0]) < 0.02  # all right: the surer the better


def test_measures_by_hand():
    assert calibration.nll(ROWS, [0, 1]) == pytest.approx(-(np.log(0.8) + np.log(0.4)) / 2)
    assert calibration.accuracy(ROWS, np.asarray([0, 1])) == 0.5


def test_refusals():
    with pytest.raises(ValueError, match="row 1 of the scores holds NaN or infinity"):
        calibration.raw([[0.0, 1.0], [np.nan, 0.0]])
    with pytest.raises(ValueError, match="scores are"):
        calibration.batch(np.zeros(3))
    for labels in ([0], [0, 2], [0.0, 1.0], [-1, 0]):
        with pytest.raises(ValueError, match="labels must be 2 class numbers from 0 to 1"):
            calibration.nll(ROWS, labels)
    with pytest.raises(ValueError, match="temperature=0"):
        calibration.with_temperature(ROWS, 0)
