"""What federated fine-tuning costs over a network, without training: memory, time, energy, outage, what dominates.

  python -m launch.plan_network --model=7b --peft=lora --weights=fp16,int4 --network=umi_20 --device=phone,vehicle

Takes shapes only: no weights are made. Writes table.md, plan.json and regimes.png (device class x PEFT x network).
"""

import dataclasses
import json
import pathlib

from absl import flags

from fmfl_jax.config import llama_preset
from fmfl_jax.experiment.config import AirConfig, make_uplink
from fmfl_jax.experiment.plan import Job, plan_all, plot_regimes, table
from fmfl_jax.experiment.workload import DEVICES, deal_devices
from fmfl_jax.models.quantize import with_group_size
from fmfl_jax.quant.awq import QuantConfig
from launch import app, tuning_flags

_MODEL = flags.DEFINE_string("model", "7b", "Model: tiny, mini, 7b, 8b, 13b or 70b.")
_PEFT = flags.DEFINE_list("peft", ["lora", "adapter", "prompt", "full"], "Any of lora, adapter, prompt, prefix, full.")
_WEIGHTS = flags.DEFINE_list("weights", ["fp16", "int4"], "Any of fp32, fp16, bf16, int4.")
_GROUP_SIZE = flags.DEFINE_integer(
    "group_size",
    None,
    "int4: weights per scale; default: 128, or the largest power of two below that divides the model's dimensions.",
    lower_bound=1,
)
_NETWORK = flags.DEFINE_list("network", ["umi_20"], "Any of umi_20, chen, yang, fedcs, tran, facts_20.")
_DEVICE = flags.DEFINE_list("device", list(DEVICES), "Any of phone, vehicle, edge_box.")
_NUM_CLIENTS = flags.DEFINE_integer("num_clients", 20, "Clients of the network, all of which take part.", lower_bound=1)
_DEADLINE = flags.DEFINE_float("deadline_s", None, "Seconds after which a round closes; default: the network's own.")
_UPLINK = flags.DEFINE_string(
    "uplink", "identity", "identity, qsgd:LEVELS, rounding:BITS, topk:FRACTION or lowrank:RANK."
)
_STEPS = flags.DEFINE_integer("local_steps", 4, "Steps of a client per round.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 4, "Windows per step.", lower_bound=1)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 128, "Tokens per window.", lower_bound=1)
_REMAT = flags.DEFINE_bool("remat", False, "Compute activations again in the backward pass: less memory, more time.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds that are simulated and averaged.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Determines everything random.", lower_bound=0)
_OUT = flags.DEFINE_string("out", "runs/plan", "Folder of the results.")


def main():
    config = llama_preset(_MODEL.value, dtype="float16")
    pefts = {name: tuning.peft for name, tuning in tuning_flags.tunings(_PEFT.value).items()}
    deal_devices(tuple(_DEVICE.value), 1)  # the names, before any work
    make_uplink(_UPLINK.value)
    quant = QuantConfig(group_size=_GROUP_SIZE.value)
    if "int4" in _WEIGHTS.value:
        quant = with_group_size(quant, config, app.say)
    airs = [
        AirConfig(network=network, deadline_s=_DEADLINE.value, devices=(device,))
        for network in _NETWORK.value
        for device in _DEVICE.value
    ]
    job = Job(_STEPS.value, _BATCH.value, _SEQ_LEN.value, _UPLINK.value, _REMAT.value)
    rows = plan_all(
        config,
        pefts,
        _WEIGHTS.value,
        airs,
        job,
        num_clients=_NUM_CLIENTS.value,
        num_rounds=_ROUNDS.value,
        group_size=quant.group_size,
        seed=_SEED.value,
    )
    if not rows:
        raise ValueError("nothing to plan: full fine-tuning needs weights that are not int4")
    directory = pathlib.Path(_OUT.value)
    directory.mkdir(parents=True, exist_ok=True)
    text = table(rows)
    (directory / "table.md").write_text(text + "\n", encoding="utf-8")
    settings = {"model": dataclasses.asdict(config), "job": job._asdict(), "num_clients": _NUM_CLIENTS.value}
    (directory / "plan.json").write_text(json.dumps(settings | {"rows": rows}, indent=2) + "\n", encoding="utf-8")
    plot_regimes(
        directory / "regimes.png",
        rows,
        title=f"{_MODEL.value}, {_NUM_CLIENTS.value} clients, {job.local_steps} steps of {job.batch_size} x "
        f"{job.seq_len} tokens: time of a round, by what dominates it",
    )
    app.say(text)
    app.say(f"results: {directory}/table.md, plan.json, regimes.png")


if __name__ == "__main__":
    app.run(main, tuning_flags)
