"""The goals for a GPU beside what `launch.gpu_check` measured, read from the JSON files in its folder.

They were set for an H200, where a copy runs at 4,300 GB/s. A time that the memory bounds is scaled by the copy rate
that was measured, so that an H100 (about 3,000) has one that it can reach; ratios stay.
"""

import dataclasses
import json
import pathlib

COPY_GBPS = 4300.0  # of the GPU that the goals were set for
TOKEN_MS = 1.3  # of 7B in 4 bits at batch 1 there


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goal:
    """measured: None where nothing was; met: measured is at most (or, at_least, at least) the goal."""

    name: str
    goal: float
    at_least: bool
    measured: float | None

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.goal if self.at_least else self.measured <= self.goal


def found(out: pathlib.Path) -> list[Goal]:
    """All goals, with what the files in `out` say."""
    bench, decode, graphs, rows = (
        _read(out / f"{name}.json") for name in ("bench", "decode", "decode_graphs", "case_study")
    )
    checks = bench.get("correctness", [])
    table = [row for row in bench.get("table", []) if row["model"] == "7b"]
    few = [row for row in table if row["m"] <= 16 and row["projection"] != "o"]
    fused = [row["copy_fraction"] for row in bench.get("extras", []) if "SwiGLU fused" in row["name"]]
    int4_ms, fp_ms = (_decode_ms(decode.get("rows", []), weights) for weights in ("int4", "fp"))
    graph_ms = _decode_ms(graphs.get("rows", []), "int4")
    best_ms = min((ms for ms in (int4_ms, graph_ms) if ms is not None), default=None)
    _, copy_gbps = card(out)
    token_ms = TOKEN_MS * COPY_GBPS / copy_gbps if copy_gbps else TOKEN_MS
    lora_s = {row["weights"]: row["fine_tune_s_per_client_round"] for row in rows or [] if row["peft"] == "lora"}
    return [
        _goal("kernels right, of all cases", 1.0, _mean([float(row["passed"]) for row in checks]), at_least=True),
        _goal(
            "7B fused shapes, M <= 16: least fraction of a copy", 0.70, _least([row["copy_fraction"] for row in few])
        ),
        _goal("7B gate|up with SwiGLU: least fraction of a copy", 0.70, _least(fused)),
        _goal("7B fused shapes, M <= 16: least speed-up over bf16", 2.5, _least([row["speedup"] for row in few])),
        _goal(
            "7B, M <= 256: least speed-up over bf16", 1.0, _least([row["speedup"] for row in table if row["m"] <= 256])
        ),
        _goal(
            "7B, M >= 2048: most time over bf16",
            1.1,
            max((row["us"] / row["bf16_dot_us"] for row in table if row["m"] >= 2048), default=None),
            at_least=False,
        ),
        _goal("7B int4 decode, batch 1: ms a token", token_ms, best_ms, at_least=False),
        _goal("7B decode, batch 1: int4 over bf16", 2.3, _ratio(fp_ms, best_ms)),
        _goal(
            "7B LoRA rounds: time over int4 / over bf16",
            1.1,
            _ratio(lora_s.get("rtn"), lora_s.get("fp")),
            at_least=False,
        ),
    ]


def card(out: pathlib.Path) -> tuple[str, float | None]:
    """(the GPU, GB/s of a copy that it measured) by the files in `out`; ("no GPU", None) where none says so."""
    for name in ("bench", "decode", "decode_graphs"):
        results = _read(out / f"{name}.json")
        if results.get("copy_gbps"):
            return results["device"], results["copy_gbps"]
    return "no GPU", None


def title(out: pathlib.Path) -> str:
    """The line above the table."""
    name, copy_gbps = card(out)
    measured = "" if copy_gbps is None else f", a copy of {copy_gbps:.0f} GB/s (measured; an H200: {COPY_GBPS:.0f})"
    return f"Goals, and what was measured on {name}{measured}"


def line(goal: Goal) -> str:
    """The row for the screen."""
    sign = ">=" if goal.at_least else "<="
    measured = "not measured" if goal.measured is None else f"{goal.measured:.3f}"
    verdict = {None: "", True: "met", False: "MISSED"}[goal.met]
    return f"{goal.name:52} goal {sign} {goal.goal:<5.4g} {measured:>12} {verdict}".rstrip()


def _goal(name: str, goal: float, measured: float | None, *, at_least: bool = True) -> Goal:
    return Goal(name=name, goal=goal, at_least=at_least, measured=measured)


def _read(path: pathlib.Path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _least(values: list[float]) -> float | None:
    return min(values, default=None)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _decode_ms(rows: list[dict], weights: str) -> float | None:
    return _least([row["ms_per_step"] for row in rows if row["weights"] == weights and row["batch"] == 1])
