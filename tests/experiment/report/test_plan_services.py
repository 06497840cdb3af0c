"""A plan's report: every part is in the text, and the map is drawn."""

from fmfl_jax.experiment.plan_services.devices import split_plans, tensor_parallel_plans
from fmfl_jax.experiment.plan_services.joint import joint_choice
from fmfl_jax.experiment.plan_services.regimes import causes, regimes
from fmfl_jax.experiment.plan_services.ways import ways_of
from fmfl_jax.experiment.report.plan_services import plot_regimes, report
from tests.experiment.plan_services.scenarios import shipped


def test_the_report_has_every_part():
    scenario = shipped("assistant_7b")
    ways = ways_of(scenario)
    text = report(
        scenario,
        ways,
        joint_choice(scenario, ways),
        causes(scenario),
        split_plans(scenario),
        tensor_parallel_plans(scenario),
    )
    for word in (
        "Pareto",
        "linear program",
        "slowest stage",
        "over a radio",
        "no: privacy",
        "price times",
        "while down",
    ):
        assert word in text, word


def test_the_map_is_drawn(tmp_path):
    scenario = shipped("assistant_7b")
    plot_regimes(tmp_path / "map.png", scenario, regimes(scenario))
    assert (tmp_path / "map.png").stat().st_size > 10_000
