"""The joint choice of a scenario keeps every limit."""

import pytest

from fmfl_jax.experiment.plan_services.joint import chosen_names, joint_choice, stand_in
from fmfl_jax.experiment.plan_services.ways import ways_of
from tests.experiment.plan_services.scenarios import shipped


def test_the_joint_choice_keeps_band_deadline_and_privacy():
    scenario = shipped("newsroom")
    joint = joint_choice(scenario, ways_of(scenario))
    found = joint.solution.evaluation
    assert joint.method == "branch and bound" and found.total_hz <= scenario.bandwidth_hz
    assert found.value <= joint.lp_bound + 1e-9
    names = chosen_names(joint)
    assert names["sources"] is None or names["sources"][1] != "cloud"
    for i, stream in enumerate(joint.problem.streams):
        if found.bandwidth_hz[i] > 0:
            air = stream.payload_bits / (stream.spectral_efficiency * found.bandwidth_hz[i])
            assert found.latency_s[i] + air == pytest.approx(stream.deadline_s)


def test_who_stands_in_for_a_place_that_is_down():
    ways = ways_of(shipped("newsroom"))
    found = stand_in("cloud", "drafts", ways)
    assert found is not None and found.place == "edge" and not found.obstacle  # the client is too slow for drafts
    assert stand_in("edge", "drafts", [way for way in ways if way.place != "cloud"]) is None


def test_many_streams_are_chosen_greedily_and_equal_users_alike():
    scenario = shipped("rush_hour")
    joint = joint_choice(scenario, ways_of(scenario))
    names, found = chosen_names(joint), joint.solution.evaluation
    assert joint.method == "greedy by value per Hz" and len(names) == 60
    assert 0 < found.value <= joint.lp_bound and found.total_hz <= scenario.bandwidth_hz * (1 + 1e-9)
    assert all(place != ["llama-7b-int4", "cloud"] for name, place in names.items() if name.startswith("private"))
