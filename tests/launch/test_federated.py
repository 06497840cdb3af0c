"""The commands federated and plan_network as a user types them, on a very small model."""

import json

import pytest

from tests.commands import run

SMALL = [
    "--model=tiny",
    "--pretrain_steps=10",
    "--seq_len=32",
    "--num_clients=4",
    "--num_rounds=3",
    "--local_steps=1",
    "--batch_size=2",
    "--max_eval_windows=16",
    "--lora_rank=2",
    "--network=chen",
]


def strict(text):
    """JSON without NaN and infinity."""

    def refuse(name):
        raise AssertionError(f"{name} in {text[:200]}")

    return json.loads(text, parse_constant=refuse)


def test_federated_over_a_network_reports_and_continues(tmp_path):
    delivery = "--delivery=coded,progressive,fountain"
    flags = [*SMALL, "--uplink=topk:0.5", "--aggregation=unbiased", delivery, f"--out={tmp_path}"]
    status, printed, err = run("launch.federated", *flags)
    assert status == 0, err
    lines = [line for line in printed.splitlines() if line.startswith("round ")]
    assert len(lines) == 4 and "perplexity" in lines[3] and "participation" in lines[3], printed
    history = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    row = strict((tmp_path / "row.json").read_text())
    strict((tmp_path / "config.json").read_text())
    assert [record["round"] for record in history] == [0, 1, 2, 3]
    assert row["participation"] == pytest.approx(sum(r["participation"] for r in history[1:]) / 3)
    assert row["seconds"] == history[-1]["seconds"] >= history[0]["seconds"] > 0
    (setup,) = (tmp_path / "setups").iterdir()
    *_, delivered = ways = strict((setup / "delivery.json").read_text())
    assert delivered["delivery"] == delivery.removeprefix("--delivery=") and len(ways) == 6
    assert delivered["base_delivery_s"] == history[0]["base_delivery_s"] < ways[1]["base_delivery_s"]
    assert f"{delivered['base_bytes']:,.0f}" in printed
    # rank 2 on q [64, 64] and v [64, 32] of 2 layers: 896 values, half of which are sent with an index of 10 bits
    assert row["trainable_params"] == 896 and row["uplink_bytes_per_client_round"] == 448 * (32 + 10) / 8
    for name in ("costs.png", "participation.png", "timeline.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    status, again, err = run("launch.federated", *flags)
    assert status == 0 and again.splitlines()[-2:] == printed.splitlines()[-2:], err


def test_clients_are_paid_and_valued(tmp_path):
    flags = [*SMALL, "--num_rounds=2", "--incentive=posted:1", "--contribution=gtg", f"--out={tmp_path}"]
    status, printed, err = run("launch.federated", *flags)
    assert status == 0, err
    lines = printed.splitlines()
    assert any("clients ask" in line for line in lines) and any("4 clients paid" in line for line in lines), printed
    assert any(line.startswith("contributions: client") for line in lines), printed
    history = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    row = strict((tmp_path / "row.json").read_text())
    assert row["recruited_per_round"] == 4 and row["total_paid_usd"] == sum(r["paid_usd"] for r in history[1:]) > 0
    assert sum(row["contributions"]) == pytest.approx(sum(sum(r["contribution"]) for r in history[1:]))
    assert (tmp_path / "contributions.png").read_bytes()[:4] == b"\x89PNG"


def test_plan_network_answers_for_seven_billion(tmp_path):
    status, printed, err = run(
        "launch.plan_network",
        "--model=7b",
        "--peft=prompt",
        "--weights=fp16,int4",
        "--network=facts_20",
        "--device=phone",
        "--rounds=2",
        f"--out={tmp_path}",
    )
    assert status == 0, err
    rows = strict((tmp_path / "plan.json").read_text())["rows"]
    assert [(row["weights"], row["fits"]) for row in rows] == [("fp16", False), ("int4", True)]
    assert rows[1]["round_s"] > 0 and rows[1]["outage"] == 0 and rows[1]["dominates"] == "compute"
    assert (tmp_path / "table.md").read_text() in printed
    assert (tmp_path / "regimes.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "module, flags, expected",
    [
        ("launch.federated", ["--network=umi"], "--network=umi: expected none or one of umi_20"),
        ("launch.federated", ["--privacy=secure", "--aggregator=krum"], "the server sees only the sum"),
        ("launch.federated", ["--lora_lr=nan"], "--lora_lr=nan: expected a finite number"),
        ("launch.federated", ["--coordinator=localhost"], "--coordinator=localhost: expected host:port"),
        ("launch.federated", ["--uplink=zip:2"], "--uplink=zip:2: expected one of identity"),
        ("launch.federated", ["--network=none", "--incentive=contract"], "--incentive=contract needs a network"),
        ("launch.federated", ["--energy_usd_per_kwh=1"], "--energy_usd_per_kwh belongs to --incentive"),
        ("launch.federated", ["--delivery=coded,arq,fountain"], "--delivery=coded,arq,fountain: expected some of arq"),
        ("launch.federated", ["--network=none", "--delivery=coded"], "--delivery needs a --network"),
        ("launch.case_study", ["--network=none", "--deadline_s=2"], "--deadline_s needs a --network"),
        ("launch.plan_network", ["--network=chen", "--device=fridge"], "--device=fridge: expected some of phone"),
    ],
)
def test_mistakes_are_one_line(tmp_path, module, flags, expected):
    small = [] if module == "launch.plan_network" else SMALL
    status, _, err = run(module, *small, *flags, f"--out={tmp_path}")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and expected in lines[0], err
    assert "Traceback" not in err
