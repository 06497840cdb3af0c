"""Federated fine-tuning: one way of tuning, one algorithm, with or without a wireless network.

  python -m launch.federated --algorithm=fedprox --proximal=0.01 --partition=dirichlet --out=runs/prox
  python -m launch.federated --network=umi_20 --num_rounds=10 --out=runs/umi
  python -m launch.federated --network=umi_20 --incentive=contract --contribution=gtg --out=runs/paid
  python -m launch.federated --privacy=dp --dp_epsilon=8 --dp_clip=0.1 --num_clients=100 --cohort_size=25 \\
      --out=runs/private

One --peft and one --weights. The model and the text are those of launch.case_study: with no --checkpoint a small one is
pre-trained on text that ships with CPython. Presets: launch/presets/*.flags. The same command with the same --out
continues a run that was stopped. Combinations that make no sense are refused with the reason.
"""

import jax
from absl import flags

from fmfl_jax.experiment.case_study import run_case_study
from fmfl_jax.experiment.config.case_study import WEIGHTS, CaseStudyConfig
from fmfl_jax.experiment.loop.divergence import divergence_text
from fmfl_jax.experiment.loop.records import claim, settings_of
from fmfl_jax.experiment.loop.rounds import Elsewhere
from fmfl_jax.experiment.loop.run_lock import run_lock
from fmfl_jax.experiment.report.contributions import contribution_line
from fmfl_jax.experiment.report.federated import write_federated_report
from fmfl_jax.experiment.report.payments import payment_text, payments_line
from launch import app
from launch.flags import federation as federation_flags
from launch.flags import fine_tuning as fine_tuning_flags
from launch.flags import network as network_flags
from launch.flags import run as run_flags

_PEFT = flags.DEFINE_enum("peft", "lora", ["lora", "adapter", "prompt", "prefix", "full"], "What is tuned.")
_WEIGHTS = flags.DEFINE_enum("weights", "fp", WEIGHTS, "Format of the base's weights.")
_OUT = flags.DEFINE_string("out", "runs/federated", "Folder of the report and of the run's state.")


def line(record: dict) -> str:
    """One evaluated round."""
    parts = [f"round {record['round']}: perplexity {record['ppl']:.3f}"]
    if "client_ppl_mean" in record:
        parts.append(
            f"clients' own {record['client_ppl_mean']:.3f} (worst decile "
            f"{record['client_ppl_worst_decile']:.3f}; shared model there {record['client_shared_ppl_mean']:.3f})"
        )
    if "epsilon" in record:
        parts.append(f"epsilon {record['epsilon']:.3f}")
    if "seconds" in record:
        parts.append(
            f"{record['seconds']:.2f} s, {record['joules']:.3f} J, {record['total_uplink_bytes']:.0f} uplink bytes"
        )
        if record["round"] == 0:
            unreached = f", {record['base_unreached']} out of reach" if record["base_unreached"] else ""
            parts[-1] += f" (delivery of the base model{unreached})"
    if "sim_seconds" in record:
        stale = f", updates {record['staleness']:.1f} steps old" if "staleness" in record else ""
        parts.append(f"{record['sim_seconds']:.2f} s of the schedule{stale}")
    if "participation" in record:
        parts.append(f"participation {record['participation']:.0%}")
        if record["cannot_hold"]:
            parts.append(f"{record['cannot_hold']:.0%} cannot hold the job")
    return ", ".join(parts) + payment_text(record) + divergence_text(record)


def config_from_flags() -> CaseStudyConfig:
    """The flags as a checked configuration."""
    return run_flags.config_from_flags(peft=[_PEFT.value], weights=[_WEIGHTS.value])


def main(elsewhere: Elsewhere | None = None):
    config = config_from_flags()
    with run_lock(_OUT.value):
        run(config, elsewhere)


def run(config: CaseStudyConfig, elsewhere: Elsewhere | None = None) -> None:
    """Runs the configuration in --out and writes its report. elsewhere: see `run_rounds`."""
    claim(_OUT.value, settings_of(config))
    show = lambda record: app.say(line(record))
    (row,) = run_case_study(config, _OUT.value, say=app.say, on_evaluation=show, elsewhere=elsewhere)
    if "participation" in row:
        app.say(
            f"per round: {row['air_s_per_round']:.3f} s on the air, {row['energy_j_per_client_round']:.4f} J per "
            f"client, participation {row['participation']:.1%}, outage {row['outage']:.1%}, "
            f"device too small {row['cannot_hold']:.1%}"
        )
    if "total_paid_usd" in row:
        app.say(payments_line(row))
    if "contributions" in row:
        app.say(contribution_line(row["contributions"]))
    coded = f" ({row['entropy_bits'] / 8:,.0f} entropy-coded)" if "entropy_bits" in row else ""
    app.say(
        f"per client and round: {row['uplink_bytes_per_client_round']:,.0f} bytes up{coded}, "
        f"{row['downlink_bytes_per_client_round']:,.0f} down, {row['fine_tune_s_per_client_round']:.4f} s"
    )
    if jax.process_index() == 0:
        app.say(f"report: {_OUT.value}/: {', '.join(write_federated_report(_OUT.value, row))}")


if __name__ == "__main__":
    app.run(main, run_flags, network_flags, federation_flags, fine_tuning_flags)
