"""Which foundation model answers whom, from where, in which band: quality, latency, energy, price, what overturns it.

  python -m launch.plan_services --scenario=launch/scenarios/newsroom.toml

Sums only: nothing is trained. Writes plan.md, plan.json and, where the scenario has a [map], regimes.png.
"""

import json
import math
import pathlib

from absl import flags

from fmfl_jax.experiment.config.scenario import read_scenario
from fmfl_jax.experiment.plan_services.devices import split_plans, tensor_parallel_plans
from fmfl_jax.experiment.plan_services.joint import chosen_names, joint_choice
from fmfl_jax.experiment.plan_services.regimes import causes, regimes
from fmfl_jax.experiment.plan_services.ways import ways_of
from fmfl_jax.experiment.report.plan_services import plot_regimes, report
from launch import app

_SCENARIO = flags.DEFINE_string("scenario", None, "A TOML file; launch/scenarios has some.", required=True)
_OUT = flags.DEFINE_string("out", "runs/plan_services", "Folder of the results.")


def main():
    scenario = read_scenario(_SCENARIO.value)
    ways = ways_of(scenario)
    joint = joint_choice(scenario, ways)
    why = [] if scenario.map is None else causes(scenario)
    splits, cuts = split_plans(scenario), tensor_parallel_plans(scenario)
    text = report(scenario, ways, joint, why, splits, cuts)
    directory = pathlib.Path(_OUT.value)
    directory.mkdir(parents=True, exist_ok=True)
    written = ["plan.md", "plan.json"]
    (directory / "plan.md").write_text(text + "\n", encoding="utf-8")
    rows = [_finite(way._asdict() | {"value": way.option.value}) for way in ways]
    for row in rows:
        del row["option"]
    found = {
        "title": scenario.title,
        "level": scenario.level,
        "placements": rows,
        "joint": {
            "method": joint.method,
            "value": joint.solution.value,
            "lp_bound": joint.lp_bound,
            "bandwidth_hz": joint.solution.evaluation.bandwidth_hz.tolist(),
            "choices": chosen_names(joint),
        },
        "causes": [cause._asdict() for cause in why],
        "splits": [plan._asdict() for plan in splits],
        "tensor_parallel": [plan._asdict() for plan in cuts],
    }
    (directory / "plan.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if scenario.map is not None:
        plot_regimes(directory / "regimes.png", scenario, regimes(scenario))
        written.append("regimes.png")
    app.say(text)
    app.say(f"\nresults: {directory}/{', '.join(written)}")


def _finite(row: dict) -> dict:
    """Without infinities, which JSON does not know: None is never."""
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}


if __name__ == "__main__":
    app.run(main)
