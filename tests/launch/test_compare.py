"""The commands compare and serve as a user types them, on a very small model."""

import json

import pytest

from tests.commands import run
from tests.launch.test_federated import SMALL

COMMON = [flag for flag in SMALL if not flag.startswith("--network")]


def test_algorithms_side_by_side_and_their_personal_adapters_served(tmp_path):
    flags = [*COMMON, "--variant=avg", "--variant=own --personalization=private_lora:1", f"--out={tmp_path}"]
    status, printed, err = run("launch.compare", *flags)
    assert status == 0, err
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["name"] for row in rows] == ["avg", "own"] and (tmp_path / "table.md").read_text() in printed
    assert rows[1]["uplink_bytes_per_client_round"] == rows[0]["uplink_bytes_per_client_round"] / 2  # rank 1 of 2
    assert rows[1]["client_ppl_worst_decile"] >= rows[1]["client_ppl_mean"] > 0
    own = tmp_path / "own"
    serve = [
        "--checkpoint=" + str(own / "base"),
        "--tokenizer=bytes",
        "--prompt=The",
        "--max_new_tokens=4",
        "--repeats=1",
    ]
    status, printed, err = run("launch.serve", *serve, f"--personal_dir={own}/setups/lora-fp/personal", "--clients=0,3")
    assert status == 0, err
    assert printed.startswith("client 0: The") and "client 3: The" in printed and "one by one" in printed
    status, _, err = run("launch.serve", *serve, f"--personal_dir={own}/setups/lora-fp/personal", "--clients=9")
    assert status == 2 and "has no adapter of client '9'" in err


def test_attacks_against_defences(tmp_path):
    status, printed, err = run(
        "launch.compare",
        *COMMON,
        "--attacks=none,scale:50",
        "--defences=mean,median",
        "--attack_fractions=0.25",
        f"--out={tmp_path}",
    )
    assert status == 0, err
    ppl = {row["name"]: row["ppl"] for row in json.loads((tmp_path / "table.json").read_text())}
    assert ppl["scale_50-mean-0.25"] > ppl["scale_50-median-0.25"] and "| attack | mean | median |" in printed


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], "give either --variant"),
        (["--variant=a", "--variant=a --algorithm=fedit"], "each NAME once"),
        (["--variant=bad --aggregator=krum --privacy=secure"], "bad: error: secure aggregation with --aggregator=krum"),
    ],
)
def test_mistakes_are_one_line(flags, expected, tmp_path):
    status, _, err = run("launch.compare", *COMMON, *flags, f"--out={tmp_path}")
    assert status == 2 and expected in err and "Traceback" not in err
