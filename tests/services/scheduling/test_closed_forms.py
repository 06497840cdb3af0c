"""Formulas against published or independently computed values, and against each other where they meet."""

import numpy as np
import pytest
from scipy import stats

from fmfl_jax.services.latency import ServiceTime, mg1_wait_s
from fmfl_jax.services.scheduling import closed_forms as forms


def test_goldens():
    assert forms.erlang_c(3, 2.0) == pytest.approx(0.444444, abs=5e-7)
    assert forms.erlang_c(8, 6.0) == pytest.approx(0.356981, abs=5e-7)
    assert forms.priority_waits_s([0.2, 0.5], [1, 1], [2, 2]) == pytest.approx([0.875, 2.916667], abs=5e-7)
    three = [0.1, 0.2, 0.3], [0.5, 1.0, 1.5], [0.5, 2.0, 4.5]
    assert forms.priority_waits_s(*three) == pytest.approx([0.947368, 1.263158, 4.0], abs=5e-7)
    assert forms.preemptive_sojourns_s(*three) == pytest.approx([0.526316, 1.368421, 6.0], abs=5e-7)
    assert forms.conserved_wait_s(*three) == pytest.approx(2.1)
    assert forms.shortest_first_wait_s(0.8, stats.expon()) == pytest.approx(1.882219, abs=1e-6)
    assert forms.srpt_sojourn_s(0.8, stats.expon()) == pytest.approx(2.352773, abs=1e-6)


@pytest.mark.parametrize(
    "rate, batch, sojourn",
    [(0.3, 1.03514, 1.05278), (1, 1.34497, 1.34917), (3, 3.79521, 2.03166), (6, 17.14288, 4.62458)],
)
def test_the_batch_servers_goldens_lie_under_its_bounds(rate, batch, sojourn):
    found = forms.batch_server(rate, batch_s=0.8, row_s=0.12)
    assert found.mean_batch == pytest.approx(batch, abs=5e-6) and found.sojourn_s == pytest.approx(sojourn, abs=5e-6)
    assert found.sojourn_s <= min(found.bound_light_s, found.bound_heavy_s)


def test_formulas_meet_where_they_describe_one_queue():
    assert forms.mmc_wait_s(0.6, 1.0, 1) == pytest.approx(1.5)  # M/M/1
    assert forms.priority_waits_s([0.6], [1.0], [2.0])[0] == pytest.approx(1.5)
    assert mg1_wait_s(ServiceTime(0.5, 0.75, 0.0), arrivals_per_s=1.2) == pytest.approx(1.125)  # scv 2
    # Erlang C by its sum over states
    for servers, load in ((3, 2.0), (8, 6.0), (40, 33.0)):
        terms = np.cumprod([1.0, *(load / k for k in range(1, servers + 1))])
        waits = terms[-1] / (1 - load / servers)
        assert forms.erlang_c(servers, load) == pytest.approx(waits / (terms[:-1].sum() + waits))
    # work of nearly one length: shortest first is first come first served
    nearly = stats.uniform(0.999, 0.002)
    assert forms.shortest_first_wait_s(0.6, nearly) < 0.75
    assert 0.75 + 1 > forms.srpt_sojourn_s(0.6, nearly)
    # one job a batch, where rows cost nothing and none come: a call takes batch_s
    assert forms.batch_server(1e-6, batch_s=0.8, row_s=0.12).sojourn_s == pytest.approx(0.92, abs=1e-5)


@pytest.mark.parametrize(
    "unstable, load",
    [
        (lambda: forms.erlang_c(2, 2.5), "1.250"),
        (lambda: forms.priority_waits_s([1.0, 1.0], [0.5, 0.7], [1, 1]), "1.200"),
        (lambda: forms.batch_server(10.0, batch_s=0.1, row_s=0.1), "1.000"),
        (lambda: forms.srpt_sojourn_s(1.3, stats.expon()), "1.300"),
    ],
)
def test_an_unstable_queue_is_an_error_that_says_the_load(unstable, load):
    with pytest.raises(ValueError, match=f"unstable: its load is {load}"):
        unstable()
