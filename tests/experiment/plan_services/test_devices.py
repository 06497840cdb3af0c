"""A scenario's models over several devices."""

import pytest

from fmfl_jax.experiment.plan_services.devices import split_plans, tensor_parallel_plans
from tests.experiment.plan_services.scenarios import shipped


def test_splits_and_tensor_parallelism_of_the_shipped_scenario():
    scenario = shipped("assistant_7b")
    first, second = split_plans(scenario)
    assert first.alone_s is None and first.latency is not None and second.stage is not None
    assert first.latency.devices[0] == 0 and set(first.latency.devices) == {0, 2}  # 13.4 GB on a phone and the edge
    radio = tensor_parallel_plans(scenario)[1]
    assert radio.all_reduce_s[radio.num_devices.index(4)] == pytest.approx(0.510, abs=5e-4)
    assert min(radio.token_s) == radio.token_s[0]
    box = tensor_parallel_plans(scenario)[0]
    assert box.token_s == sorted(box.token_s, reverse=True)
