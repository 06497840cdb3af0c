"""Drawn requests have their tasks' shares, lengths, deadlines and priorities."""

import numpy as np
import pytest

from fmfl_jax.services.latency import LogNormal, clipped_moment
from fmfl_jax.services.scheduling.arrivals import Poisson
from fmfl_jax.services.scheduling.workload import Task, draw_workload


def test_tasks():
    tasks = [
        Task(share=3, prompt=40, output=4, output_sigma=0.0, limit=8, deadline_s=2.0),
        Task(share=1, output=55, limit=128, prompt_limit=90, priority=1),
    ]
    found = draw_workload(tasks, Poisson(2.0), 40_000, np.random.default_rng(0))
    short = found.task == 0
    assert short.mean() == pytest.approx(0.75, abs=0.01)
    assert (found.output_tokens[short] == 4).all() and (found.requests.priorities == found.task).all()
    requests = found.requests
    np.testing.assert_allclose(requests.deadlines_s[short] - requests.arrivals_s[short], 2.0)
    assert np.isinf(requests.deadlines_s[~short]).all()
    long = found.output_tokens[~short]
    assert long.max() == 128 and found.prompt_tokens[~short].max() == 90 and found.prompt_tokens.min() >= 1
    assert long.mean() == pytest.approx(clipped_moment(LogNormal(np.log(55), 1.0), 1, 128), rel=0.02)
    assert np.median(found.prompt_tokens[short]) == pytest.approx(40, abs=1)


def test_bad_input():
    for wrong, reason in (({"share": 0}, "share"), ({"limit": 0}, "limit"), ({"deadline_s": -1.0}, "deadline_s=-1")):
        with pytest.raises(ValueError, match=reason):
            Task(**wrong)
    with pytest.raises(ValueError, match="no task"):
        draw_workload([], Poisson(1.0), 5, np.random.default_rng(0))
