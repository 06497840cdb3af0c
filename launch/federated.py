"""Federated fine-tuning over a wireless network: perplexity against seconds, joules and bytes.

  python -m launch.federated --network=umi_20 --num_rounds=10 --out=runs/umi

One way of tuning (--peft) and one weight format (--weights). The model and the text are those of launch.case_study: with
no --checkpoint a small one is pre-trained on text that ships with CPython. Networks of the literature are in
launch/presets/network_*.flags. The same command with the same --out continues a run that was stopped.
"""

from absl import flags
import jax

from fmfl_jax.experiment.air_report import write_air_report
from fmfl_jax.experiment.case_study import claim_folder, run_case_study
from launch import app, run_flags, tuning_flags

_PEFT = flags.DEFINE_enum("peft", "lora", ["lora", "adapter", "prompt", "prefix", "full"], "What is tuned.")
_WEIGHTS = flags.DEFINE_enum("weights", "fp", ["fp", "awq", "rtn"], "Format of the base's weights.")
_OUT = flags.DEFINE_string("out", "runs/federated", "Folder of the report and of the run's state.")


def line(record: dict) -> str:
    """One evaluated round."""
    costs = f"{record['seconds']:.2f} s, {record['joules']:.3f} J, {record['total_uplink_bytes']:.0f} uplink bytes"
    if "participation" not in record:
        unreached = f", {record['base_unreached']} out of reach" if record["base_unreached"] else ""
        return f"round 0: perplexity {record['ppl']:.3f}, {costs} (delivery of the base model{unreached})"
    unable = f", {record['cannot_hold']:.0%} cannot hold the job" if record["cannot_hold"] else ""
    return (f"round {record['round']}: perplexity {record['ppl']:.3f}, {costs}, "
            f"participation {record['participation']:.0%}{unable}")


def main():
    config = run_flags.config_from_flags(peft=[_PEFT.value], weights=[_WEIGHTS.value])
    if config.air is None:
        raise ValueError("launch.federated needs a --network; without one use launch.case_study")
    claim_folder(_OUT.value, config)
    row, = run_case_study(config, _OUT.value, say=app.say, on_evaluation=lambda record: app.say(line(record)))
    app.say(f"per round: {row['air_s_per_round']:.3f} s on the air, {row['energy_j_per_client_round']:.4f} J per client, "
            f"participation {row['participation']:.1%}, outage {row['outage']:.1%}, "
            f"device too small {row['cannot_hold']:.1%}")
    if jax.process_index() == 0:
        app.say(f"report: {_OUT.value}/: {', '.join(write_air_report(_OUT.value, row))}")


if __name__ == "__main__":
    app.run(main, run_flags, tuning_flags)
