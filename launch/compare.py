"""A table of several federated runs that share one setting: algorithms side by side, or attacks against defences.

  python -m launch.compare --flagfile=launch/presets/compare_algorithms.flags --checkpoint=DIR \\
      --train_text=FILE --eval_text=FILE
  python -m launch.compare --flagfile=launch/presets/attacks_defences.flags --checkpoint=DIR \\
      --train_text=FILE --eval_text=FILE

Each --variant="NAME --flag=value ..." is one run of launch.federated with these flags beside the common ones. With
--attacks and --defences instead every attack meets every defence at every one of --attack_fractions. Each run has its
own folder under --out; a run that is done is not done again. Without --checkpoint one base is pre-trained for all runs.
Writes table.md and table.json.
"""

import json
import pathlib
import shutil
import subprocess
import sys

from absl import flags

from fmfl_jax.experiment.base import prepare_base
from fmfl_jax.experiment.loop.run_lock import run_lock
from launch import app
from launch.flags import federation as federation_flags
from launch.flags import fine_tuning as fine_tuning_flags
from launch.flags import network as network_flags
from launch.flags import run as run_flags

_VARIANTS = flags.DEFINE_multi_string("variant", [], "NAME --flag=value ...: one run; may be given again and again.")
_ATTACKS = flags.DEFINE_list("attacks", [], "Attacks, as --attack takes them.")
_DEFENCES = flags.DEFINE_list("defences", [], "Defences, as --aggregator takes them.")
_FRACTIONS = flags.DEFINE_list("attack_fractions", ["0.2"], "Shares of the clients that attack.")
_PEFT = flags.DEFINE_string("peft", "lora", "As in launch.federated.")
_WEIGHTS = flags.DEFINE_string("weights", "fp", "As in launch.federated.")
_OUT = flags.DEFINE_string("out", "runs/compare", "Folder of the table and of the runs.")


def common_flags() -> list[str]:
    """What was given on the command line, or in its flag files, that launch.federated knows too."""
    given = [
        flag
        for module in (run_flags, network_flags, federation_flags, fine_tuning_flags)
        for flag in flags.FLAGS.get_key_flags_for_module(module)
        if flag.present
    ]
    return [part for flag in given for part in flag.serialize().splitlines()]


# Flags that the pre-trained base depends on: a variant that sets one of these pre-trains its own.
_OF_BASE = {"checkpoint", "tokenizer", "model", "random_init", "dtype", "seq_len", "seed"}


def shares_base(own: list[str]) -> bool:
    """Whether a run with these flags starts from the base that all share."""
    names = {flag.lstrip("-").partition("=")[0] for flag in own}
    return not any(name in _OF_BASE or name.startswith("pretrain_") for name in names)


def pretrained_base() -> pathlib.Path | None:
    """The folder of the base that the runs share, pre-trained where it is missing; None where they pre-train none."""
    config = run_flags.config_from_flags(peft=[_PEFT.value], weights=[_WEIGHTS.value])
    if config.checkpoint is not None or config.random_init:
        return None
    prepare_base(config, pathlib.Path(_OUT.value), app.say)
    return pathlib.Path(_OUT.value) / "base"


def run(name: str, own: list[str], common: list[str], base: pathlib.Path | None) -> dict:
    """The row of one run of launch.federated, from its folder where it is done.

    Raises ValueError with the run's own message where it fails.
    """
    folder = pathlib.Path(_OUT.value) / name
    command = [
        sys.executable,
        "-m",
        "launch.federated",
        *common,
        f"--peft={_PEFT.value}",
        f"--weights={_WEIGHTS.value}",
        *own,
        f"--out={folder}",
    ]
    if not (folder / "row.json").exists():
        if base is not None and shares_base(own):
            shutil.copytree(base, folder / "base", dirs_exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{name}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    row = json.loads((folder / "row.json").read_text(encoding="utf-8"))
    app.say(f"{name}: perplexity {row['ppl']:.3f}")
    return {"name": name} | row


def variants() -> list[tuple[str, list[str]]]:
    """(name, its flags) of every --variant. Raises ValueError for a name given twice or none."""
    found = [(parts[0], parts[1:]) for parts in map(str.split, _VARIANTS.value) if parts]
    names = [name for name, _ in found]
    if len(set(names)) < len(names) or any(name.startswith("-") for name in names):
        raise ValueError(f"--variant: expected NAME --flag=value ..., each NAME once, got {', '.join(names)}")
    return found


def algorithms_table(rows: list[dict]) -> str:
    """Markdown: what each run reached and what it cost."""
    lines = [
        "| run | perplexity | bits per byte | on clients' own text: mean (worst decile) | epsilon | up, kB | down, kB "
        "| s per client and round | aggregation bias |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        own = "-"
        if "client_ppl_mean" in row:
            own = (
                f"{row['client_ppl_mean']:.2f} ({row['client_ppl_worst_decile']:.2f}), shared "
                f"{row['client_shared_ppl_mean']:.2f}"
            )
        lines.append(
            f"| {row['name']} | {row['ppl']:.2f} | {row['bits_per_byte']:.4f} | {own} | "
            f"{_number(row, 'epsilon', '.2f')} | {row['uplink_bytes_per_client_round'] / 1e3:.1f} | "
            f"{row['downlink_bytes_per_client_round'] / 1e3:.1f} | {row['fine_tune_s_per_client_round']:.4f} | "
            f"{_number(row, 'aggregation_bias', '.4f')} |"
        )
    return f"Perplexity before fine-tuning: {rows[0]['ppl_before']:.2f}\n\n" + "\n".join(lines)


def attacks_table(found: dict, fraction: str) -> str:
    """Markdown: perplexity by attack (rows) and defence (columns). found: {(attack, defence): row}."""
    lines = [
        f"{float(fraction):.0%} of the clients attack",
        "",
        "| attack | " + " | ".join(_DEFENCES.value) + " |",
        "|---" * (1 + len(_DEFENCES.value)) + "|",
    ]
    for attack in _ATTACKS.value:
        cells = [f"{found[attack, defence]['ppl']:.4g}" for defence in _DEFENCES.value]
        lines.append(f"| {attack} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(row: dict, column: str, how: str) -> str:
    return format(row[column], how) if column in row else "-"


def main():
    if bool(_ATTACKS.value) != bool(_DEFENCES.value) or bool(_ATTACKS.value) == bool(_VARIANTS.value):
        raise ValueError("give either --variant, again and again, or --attacks and --defences")
    with run_lock(_OUT.value):
        compare()


def compare() -> None:
    """Runs what is missing of the comparison in --out and writes its tables."""
    common, base, rows, texts = common_flags(), pretrained_base(), [], []
    if _VARIANTS.value:
        rows = [run(name, own, common, base) for name, own in variants()]
        texts.append(algorithms_table(rows))
    for fraction in _FRACTIONS.value if _ATTACKS.value else []:
        found = {}
        for attack in _ATTACKS.value:
            for defence in _DEFENCES.value:
                own = [f"--attack={attack}", f"--aggregator={defence}", f"--attack_fraction={fraction}"]
                name = f"{attack}-{defence}-{fraction}".replace(":", "_")
                found[attack, defence] = run(name, own, common, base)
        rows += found.values()
        texts.append(attacks_table(found, fraction))
    text, folder = "\n\n".join(texts) + "\n", pathlib.Path(_OUT.value)
    (folder / "table.md").write_text(text, encoding="utf-8")
    (folder / "table.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    app.say("\n" + text + f"results: {folder}/table.md, table.json")


if __name__ == "__main__":
    app.run(main, run_flags, network_flags, federation_flags, fine_tuning_flags)
