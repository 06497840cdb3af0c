"""The clients' own text and the summary over them."""

import numpy as np
import pytest

from fmfl_jax.experiment.evaluation.per_client import hold_out, summary
from tests.experiment.toys import llama_data


def test_held_out_windows_are_nobodys_training_llama_data():
    train, held = hold_out(llama_data(), 0.2, most=3, seed=0)
    for before, kept, out in zip(llama_data().client_indices, train.client_indices, held.client_indices):
        assert sorted([*kept, *out]) == sorted(before) and 1 <= len(out) <= 3 and len(kept)
    found = summary(np.log(np.arange(1, 21)))
    assert found["client_ppl_mean"] == pytest.approx(10.5) and found["client_ppl_worst_decile"] == pytest.approx(19.5)
