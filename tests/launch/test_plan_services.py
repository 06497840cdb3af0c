"""launch.plan_services as a user types it: a scenario's tables and files, and mistakes in one line."""

import json

from tests import commands


def test_a_scenario_is_planned_and_mistakes_are_one_line(tmp_path):
    given = "--scenario=launch/scenarios/newsroom.toml"
    first = commands.start("launch.plan_services", given, f"--out={tmp_path / 'plan'}")
    second = commands.start("launch.plan_services", f"--scenario={tmp_path / 'none.toml'}")
    (tmp_path / "bad.toml").write_text("title = 3\n", encoding="utf-8")
    third = commands.start("launch.plan_services", f"--scenario={tmp_path / 'bad.toml'}", f"--out={tmp_path / 'bad'}")
    done = first.wait()
    assert done.status == 0, done.err
    assert "branch and bound" in done.out and "What keeps cloud ahead of edge" in done.out
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text(encoding="utf-8"))
    assert plan["joint"]["value"] <= plan["joint"]["lp_bound"] + 1e-9
    assert len(plan["joint"]["choices"]) == 8
    assert (tmp_path / "plan" / "regimes.png").exists()
    assert (tmp_path / "plan" / "plan.md").read_text(encoding="utf-8").startswith("# A newsroom")
    for done, said in ((second.wait(), "none.toml"), (third.wait(), "bad.toml: missing keys bandwidth_hz")):
        assert done.status == 2 and done.out == ""
        assert said in done.err and len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "bad").exists()
