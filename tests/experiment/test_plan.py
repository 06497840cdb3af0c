"""A plan from shapes alone: which phase decides, and what has no size to plan with."""

import pytest

from fmfl_jax.config import llama_preset
from fmfl_jax.experiment.config.network import NetworkConfig
from fmfl_jax.experiment.methods.codecs import Qsgd, TopK
from fmfl_jax.experiment.plan import Job, plan_all
from fmfl_jax.experiment.report.plan import regime, table
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.split import FullConfig
from tests.experiment.toys import assert_finite


def test_a_plan_names_what_decides():
    config = llama_preset("tiny", dtype="float16")
    networks = [
        NetworkConfig(network="facts_20", devices=("phone",)),
        NetworkConfig(network="facts_20", devices=("phone",), deadline_s=1e-5),
    ]
    rows = plan_all(
        config,
        {"lora": LoraConfig(), "full": FullConfig()},
        ["fp16", "int4"],
        networks,
        Job(1, 1, 16),
        num_clients=4,
        num_rounds=2,
        group_size=32,
    )
    assert len(rows) == 2 * 2 + 2  # no full fine-tuning of int4
    assert rows[0]["dominates"] == "uplink" and rows[0]["outage"] == 0 and rows[0]["round_s"] > 0
    assert regime(rows[1]) == "nothing arrives" and rows[1]["round_s"] == pytest.approx(1e-5)
    by_form = {row["weights"]: row for row in rows if row["peft"] == "lora"}
    assert by_form["int4"]["weight_bytes"] < by_form["fp16"]["weight_bytes"]
    assert_finite(rows)
    assert len(table(rows).splitlines()) == 2 + len(rows)


def test_a_codec_shortens_the_planned_upload_unless_its_code_has_no_fixed_length():
    config, network = llama_preset("tiny", dtype="float16"), NetworkConfig(network="facts_20")

    def uplink_bytes(uplink):
        job, tuned = Job(1, 1, 16, uplink), {"lora": LoraConfig()}
        return plan_all(config, tuned, ["fp16"], [network], job, num_clients=2, num_rounds=1)[0]["uplink_bytes"]

    # rank 8 on q [64, 64] and v [64, 32] of 2 layers: 3584 values; half of them are sent, with 12 bits for the place
    assert uplink_bytes(TopK(0.5)) == 1792 * (32 + 12) / 8
    with pytest.raises(ValueError, match="uplink=qsgd has no size to plan with"):
        uplink_bytes(Qsgd(4, coding="elias"))
