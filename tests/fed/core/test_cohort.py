"""Cohorts on devices: how far they are filled up, with what, and that it comes off again."""

import numpy as np
import pytest

from fmfl_jax.fed.core.cohort import lay_out, padded_size, without_padding
from fmfl_jax.fed.core.types import Cohort


def test_padding_fills_whole_passes():
    assert padded_size(20, num_devices=8) == 24
    assert padded_size(20, num_devices=1, clients_per_pass=6) == 24
    assert padded_size(3, num_devices=8, clients_per_pass=4) == 8


def test_a_cohort_is_filled_up_with_nothing_and_comes_back():
    rng = np.random.default_rng(0)
    ids = np.asarray([4, 0, 7], np.int32)
    weights = np.asarray([2, 0, 5], np.float32)
    server = rng.normal(size=(2, 4)).astype(np.float32)
    cohort = Cohort(
        ids,
        weights,
        rng.normal(size=(3, 2, 4)).astype(np.float32),
        client_states={"v": rng.normal(size=(3, 5)).astype(np.float32)},
        num_steps=np.asarray([2, 1, 2], np.int32),
        server_batches=server,
    )
    laid_out = lay_out(cohort, num_devices=2, clients_per_pass=2, capacity=5)  # 3 clients, room for 5, 4 on a device
    assert laid_out.client_ids.shape == (2, 4)
    np.testing.assert_array_equal(laid_out.delivered.reshape(-1)[:3], weights > 0)
    np.testing.assert_array_equal(laid_out.denominators.reshape(-1)[:3], weights)
    np.testing.assert_array_equal(laid_out.server_batches, np.stack([server, server]))
    for name in ("client_ids", "weights", "batches", "num_steps", "client_states"):
        given, laid = getattr(cohort, name), getattr(laid_out, name)
        if name == "client_states":
            given, laid = given["v"], laid["v"]
        np.testing.assert_array_equal(without_padding(laid, 3), given)
        assert not np.any(laid.reshape(8, *laid.shape[2:])[3:])
    assert not np.any(laid_out.delivered.reshape(-1)[3:]) and not np.any(laid_out.denominators.reshape(-1)[3:])


def test_cohorts_beyond_the_capacity_and_without_any_are_refused():
    some = Cohort(np.zeros(3, np.int32), np.ones(3, np.float32), np.zeros((3, 1, 2), np.float32))
    nobody = Cohort(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros((0, 1, 2), np.float32))
    assert lay_out(nobody, num_devices=2, capacity=3).batches.shape == (2, 2, 1, 2)
    for cohort, capacity in ((some, 2), (nobody, None)):
        with pytest.raises(ValueError, match="does not fit"):
            lay_out(cohort, num_devices=2, capacity=capacity)
