"""All checks and measurements that need a GPU, in one call of under ten minutes.

  python -m launch.gpu_check --out=$OUT                          (on the GPU)
  python -m launch.gpu_check --out=/tmp/x --preset=mini --steps=decode,case_study     (on a CPU: does it run through?)

In this order, each in a process of its own that is ended when its share of the time is over: the kernels against the
fp32 reference and their table (kernels.w4a16.bench, which stops at the first wrong result, and so does this), decoding
(launch.benchmark_decode), Table II at 7B with random weights and its rounds (launch/presets/table2_7b.flags, cut
short), decoding again with the whole loop as one CUDA graph, and other block configurations (kernels.w4a16.tune, for
a person to read). Every step leaves what it has measured so far in --out; summary.json says how each one ended. A
second call with the same --out leaves out the steps that ended well, and the kernels' table goes on where it stopped.
At the end stands the table of goals (goals.json). Nothing is fetched from a network.
"""

import configparser
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

from absl import flags

from launch import app, gpu_goals

_OUT = flags.DEFINE_string("out", None, "Folder for the results.", required=True)
_PRESET = flags.DEFINE_string("preset", "7b", "Model of decoding and case study.")
_STEPS = flags.DEFINE_list(
    "steps", ["bench", "decode", "case_study", "graphs", "tune"], "Which steps, of these five, in this order."
)
_BUDGET_S = flags.DEFINE_float("budget_s", 570.0, "Seconds for all steps together.", lower_bound=1)

TIME_LIMIT = "ended at its time limit"  # the status of such a step

# XLA's GPU backend then captures whole loops, and short runs of launches too, as CUDA graphs.
_GRAPHS = "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL --xla_gpu_graph_min_graph_size=1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """arguments: of python -m. share: of what is left of the budget when it starts, all of it for the last. has_budget:
    it takes --budget_s and says in OUT/NAME.json what it left out. fatal: failing ends everything."""

    arguments: list[str]
    share: float
    has_budget: bool = False
    xla_flags: str = ""
    fatal: bool = False


def steps(out: pathlib.Path, scratch: str, preset: str) -> dict[str, Step]:
    """The steps by name, in order."""
    decode = ["launch.benchmark_decode", f"--preset={preset}"]
    return {
        "bench": Step(
            arguments=[
                "kernels.w4a16.bench",
                "--model=7b",
                f"--json={out / 'bench.json'}",
            ],
            share=0.4,
            has_budget=True,
            fatal=True,
        ),
        "decode": Step(
            arguments=[
                *decode,
                "--weights=int4,fp",
                "--batch=1,8,64",
                f"--json={out / 'decode.json'}",
            ],
            share=0.45,
            has_budget=True,
        ),
        "case_study": Step(
            arguments=[
                "launch.case_study",
                "--flagfile=launch/presets/table2_7b.flags",
                f"--model={preset}",
                "--num_rounds=2",
                f"--out={scratch}",
            ],
            share=0.75,
        ),
        "graphs": Step(
            arguments=[*decode, "--weights=int4", "--batch=1", f"--json={out / 'decode_graphs.json'}"],
            share=0.6,
            xla_flags=_GRAPHS,
        ),
        "tune": Step(
            arguments=["kernels.w4a16.tune", "--rows=1", "--rows=16"],
            share=1.0,
            has_budget=True,
        ),
    }


def missing_wheels() -> list[str]:
    """What pip must still install, in the versions that constraints.txt has: setup.cfg's list and CUDA for jax."""
    pinned = {}
    for line in pathlib.Path("constraints.txt").read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition("==")
        pinned[name.lower()] = version
    setup = configparser.ConfigParser()
    setup.read("setup.cfg", encoding="utf-8")
    needed = [re.split("[ ;>]", line)[0] for line in setup["options"]["install_requires"].split("\n") if line]
    wheels = [f"{name}=={pinned[name.lower()]}" for name in needed if not _is_installed(name)]
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        wheels.append(f"jax[cuda13]=={pinned['jax']}")
    return wheels


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def run_step(name: str, step: Step, limit_s: float, out: pathlib.Path) -> dict:
    """Runs one step with its output in out/NAME.log, and ends its whole process group at the limit."""
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {step.xla_flags}".strip()}
    begin = time.monotonic()
    arguments = [*step.arguments, *([f"--budget_s={0.9 * limit_s:.0f}"] if step.has_budget else [])]
    with open(out / f"{name}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = TIME_LIMIT
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return {
        "status": status,
        "seconds": round(time.monotonic() - begin, 1),
        "limit_s": round(limit_s, 1),
        "command": "python -m " + " ".join(arguments),
    }


def left_to_do(names: list[str], summary: dict, out: pathlib.Path) -> list[str]:
    """Which steps still have something to measure: those that never ended well, then those that left something out."""
    ended = [name for name in names if summary.get(name, {}).get("status") == 0]

    def left_out(name: str) -> list:
        path = out / f"{name}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found.get("left_out", []) if isinstance(found, dict) else []

    return [name for name in names if name not in ended] + [name for name in ended if left_out(name)]


def collect_rows(scratch: str, out: pathlib.Path) -> None:
    """The rows of the setups that the case study finished, and its table where it finished all."""
    paths = sorted(pathlib.Path(scratch).glob("setups/*/row.json"))
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if rows:
        (out / "case_study.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    table = pathlib.Path(scratch) / "table.md"
    if table.exists():
        shutil.copy(table, out / "case_study.md")


def main():
    out = pathlib.Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + _BUDGET_S.value
    summary_path = out / "summary.json"
    summary = json.loads(summary_path.read_text(encoding="utf-8")) if summary_path.exists() else {}
    scratch = f"{out}/case_study_run"  # what it has finished there it does not do again
    known = steps(out, scratch, _PRESET.value)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that run_step ends the step that is under way
    unknown = [name for name in _STEPS.value if name not in known]
    if unknown:
        raise ValueError(f"--steps={unknown[0]}: expected some of {', '.join(known)}")
    wheels = missing_wheels()
    if wheels and _PRESET.value == "7b":
        app.say(f"not installed: {' '.join(wheels)} (pip install -c constraints.txt {' '.join(wheels)})")
    pending = left_to_do(_STEPS.value, summary, out)
    for name in _STEPS.value:
        if name not in pending:
            app.say(f"{name}: done before, {summary[name]['seconds']} s")
    for name in pending:
        share = 1.0 if name == pending[-1] else known[name].share
        limit_s = share * max(0.0, end - time.monotonic())
        app.say(f"{name}: at most {limit_s:.0f} s")
        summary[name] = run_step(name, known[name], limit_s, out)
        app.say((out / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-4000:])
        app.say(f"{name}: {summary[name]['status']} after {summary[name]['seconds']} s")
        collect_rows(scratch, out)
        summary_path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        if known[name].fatal and summary[name]["status"] not in (0, TIME_LIMIT):
            raise ValueError(f"{name} failed: see {out / name}.log; nothing more is measured")
    if _PRESET.value == "7b":
        goals = gpu_goals.found(out)
        text = json.dumps([dataclasses.asdict(goal) for goal in goals], indent=1)
        (out / "goals.json").write_text(text + "\n", encoding="utf-8")
        app.say("\n".join([gpu_goals.title(out), *map(gpu_goals.line, goals)]))


if __name__ == "__main__":
    app.run(main)
