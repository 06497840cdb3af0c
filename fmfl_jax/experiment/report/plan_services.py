"""The report of a services plan: tables, what overturns the cloud's lead, and the regime map."""

import math
import pathlib
from collections.abc import Sequence

from fmfl_jax.experiment.config.scenario import Scenario
from fmfl_jax.experiment.plan_services.devices import SplitPlan, TensorParallelPlan
from fmfl_jax.experiment.plan_services.joint import Joint, stand_in
from fmfl_jax.experiment.plan_services.regimes import Cause, Regimes
from fmfl_jax.experiment.plan_services.ways import Way
from fmfl_jax.experiment.report.plan import duration
from fmfl_jax.experiment.report.pyplot import files_only, save
from fmfl_jax.services.qos.problem import REFUSED

_COLORS = ("#8fbbe0", "#9ed49e", "#f7b77a", "#c9b3de", "#f2d675", "#b5b5b5")
_NOBODY = "#f4f4f4"


def report(
    scenario: Scenario,
    ways: list[Way],
    joint: Joint,
    causes: list[Cause],
    splits: list[SplitPlan],
    tensor_parallel: list[TensorParallelPlan],
) -> str:
    """All of it as Markdown."""
    parts = [
        f"# {scenario.title}",
        f"## Placements ({_share(scenario.level)} of the requests in time; an equal share of "
        f"{scenario.bandwidth_hz / 1e6:g} MHz)",
        placements(ways, scenario.level),
        "## All streams together",
        joint_table(scenario, joint, ways),
    ]
    if scenario.map is not None:
        parts += [
            f"## What keeps {scenario.map.first} ahead of {scenario.map.second} ({scenario.map.stream}, "
            f"{scenario.map.model}), and what overturns it",
            causes_table(scenario, causes),
        ]
    if splits:
        parts += ["## Layers over devices", splits_table(splits)]
    if tensor_parallel:
        parts += ["## Layers cut over devices (tensor parallel), a token", tensor_parallel_table(tensor_parallel)]
    return "\n\n".join(parts)


def placements(ways: list[Way], level: float) -> str:
    """placement x quality x latency x energy x price, and which are dominated."""
    cells = [["stream", "place", "model", "quality", "p50", _share(level, "p"), "no queue", "J", "price", "value", ""]]
    for way in ways:
        note = f"beaten by {way.beaten_by}" if way.beaten_by else "Pareto"
        if way.obstacle:
            note = f"no: {way.obstacle}" + (f" {way.load:.2f}" if way.obstacle == "load" else "")
        cells.append(
            [
                way.stream,
                way.place,
                way.model,
                f"{way.quality:.3f}",
                _seconds(way.p50_s),
                _seconds(way.p95_s),
                _seconds(way.idle_p95_s),
                f"{way.energy_j:.3g}",
                f"{way.price:.3g}",
                f"{way.option.value:.4g}",
                note,
            ]
        )
    return _aligned(cells)


def joint_table(scenario: Scenario, joint: Joint, ways: list[Way]) -> str:
    """Who is served by what, where, in which band, and by whom in an outage; equal streams with equal choices are one
    row."""
    problem, found = joint.problem, joint.solution.evaluation
    rows: dict[tuple, list[float]] = {}
    for i, choice in enumerate(joint.solution.assignment):
        kind = _kind(scenario, problem.streams[i].name)
        if choice == REFUSED:
            rows.setdefault((kind, "refused", "-", "-", "-", "-"), []).append(0.0)
            continue
        option = problem.options[i][choice]
        instead = "-"
        if problem.places[option.place].availability < 1:
            way = stand_in(option.place, kind, ways)
            instead = "nobody" if way is None else way.name
        seconds = _seconds(float(found.latency_s[i]))
        key = (kind, option.model, option.place, seconds, f"{option.value:.4g}", instead)
        rows.setdefault(key, []).append(float(found.bandwidth_hz[i]))
    cells = [
        [
            "stream",
            "users",
            "model",
            "place",
            f"{_share(scenario.level, 'p')} before air",
            "value",
            "kHz each",
            "while down",
        ]
    ]
    for (kind, model, place, latency, value, instead), hz in rows.items():
        cells.append([kind, str(len(hz)), model, place, latency, value, f"{sum(hz) / len(hz) / 1e3:.4g}", instead])
    gap = 1 - joint.solution.value / joint.lp_bound if joint.lp_bound > 0 else 0.0
    summary = (
        f"Value {joint.solution.value:.6g} by {joint.method}; no choice is worth more than {joint.lp_bound:.6g} "
        f"(linear program; gap {gap:.2%}). Band used: {found.total_hz / 1e6:.4g} of "
        f"{problem.bandwidth_hz / 1e6:g} MHz."
    )
    return _aligned(cells) + "\n\n" + summary


def causes_table(scenario: Scenario, causes: list[Cause]) -> str:
    """Each cause alone: where it stands, and where the lead ends."""
    assert scenario.map is not None
    cells = [["cause", "now", "lead ends at", "ahead now"]]
    for cause in causes:
        ahead = scenario.map.first if cause.holds else scenario.map.second
        cells.append([cause.name, cause.now, cause.turns_at or "-", ahead])
    broken = [cause.name for cause in causes if not cause.holds]
    verdict = (
        f"{scenario.map.first} answers: nothing stands against it."
        if not broken
        else f"Against {scenario.map.first}: {'; '.join(broken)}."
    )
    return _aligned(cells) + "\n\n" + verdict


def splits_table(splits: list[SplitPlan]) -> str:
    """Both objectives; layers as device x count in order."""
    cells = [["model", "tokens", "devices", "objective", "seconds", "layers at", "first device alone"]]
    for plan in splits:
        alone = "does not fit" if plan.alone_s is None else duration(plan.alone_s)
        for objective, found in (("latency", plan.latency), ("slowest stage", plan.stage)):
            what = plan.reason if found is None else _runs(found.devices, plan.devices)
            seconds = "-" if found is None else duration(found.seconds)
            cells.append([plan.model, str(plan.tokens), ", ".join(plan.devices), objective, seconds, what, alone])
    return _aligned(cells)


def tensor_parallel_table(plans: list[TensorParallelPlan]) -> str:
    """A token's time by number of devices, and how much of it is all-reduces."""
    cells = [["link", "model", "place", "devices", "a token", "all-reduces"]]
    for plan in plans:
        for n, token, reduce in zip(plan.num_devices, plan.token_s, plan.all_reduce_s):
            cells.append([plan.name, plan.model, plan.place, str(n), duration(token), duration(reduce)])
    return _aligned(cells)


def plot_regimes(path: pathlib.Path, scenario: Scenario, found: Regimes) -> None:
    """Two maps of the first place: load x round trip, coloured by the fastest place; availability x price, by the most
    valuable in time. A cross marks the scenario."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    assert scenario.map is not None
    first, stream = scenario.place(scenario.map.first), scenario.stream(scenario.map.stream)
    colors = {place.name: _COLORS[i % len(_COLORS)] for i, place in enumerate(scenario.places)} | {"": _NOBODY}
    fig, axes = files_only().subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    panels = (
        (axes[0], found.loads, found.rtts_s, found.fastest, (first.background_load, first.rtt_s)),
        (axes[1], found.price_factors, found.availabilities, found.best, (1.0, first.availability)),
    )
    for ax, x, y, names, here in panels:
        pixels = [[_rgb(colors[name]) for name in row] for row in names]
        ax.pcolormesh(x, y, pixels, shading="nearest", rasterized=True)
        ax.plot(*here, marker="x", color="black", markersize=9, markeredgewidth=2, clip_on=False, zorder=5)
    axes[0].set(
        xlabel=f"load of {first.name} by others",
        ylabel=f"round trip to {first.name}, s",
        title=f"fastest at p{100 * scenario.level:g}",
    )
    axes[1].set(
        xlabel=f"price of {first.name} over today's",
        ylabel=f"availability of {first.name}",
        title=f"most valuable, at its load of {first.background_load:.0%}",
        xscale="log",
    )
    used = {str(name) for names in (found.fastest, found.best) for name in names.flat}
    label = {name: name or f"nobody within {stream.deadline_s:g} s" for name in colors}
    handles = [Rectangle((0, 0), 1, 1, color=colors[name], label=label[name]) for name in colors if name in used]
    mark = Line2D([], [], marker="x", color="black", linestyle="", label="the scenario")
    fig.legend(handles=[*handles, mark], loc="outside lower center", ncols=len(handles) + 1, fontsize=9)
    fig.suptitle(f"{stream.name} by {scenario.map.model} ({scenario.title})", fontsize=11)
    save(fig, path)


def _rgb(color: str) -> tuple[float, float, float]:
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))  # pyright: ignore[reportReturnType]


def _aligned(cells: list[list[str]]) -> str:
    """A Markdown table."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _seconds(seconds: float) -> str:
    return duration(seconds) if math.isfinite(seconds) else "never"


def _share(level: float, prefix: str = "") -> str:
    return f"{prefix}{100 * level:g}" if prefix else f"{100 * level:g} %"


def _kind(scenario: Scenario, name: str) -> str:
    """The stream that a user belongs to."""
    return next(
        row.name
        for row in scenario.streams
        if name == row.name or (row.count > 1 and name.rpartition(" ")[0] == row.name)
    )


def _runs(devices: Sequence[int], names: list[str]) -> str:
    """Blocks in order: phone 0-3, edge 4-31."""
    blocks, start = [], 0
    for end in range(1, len(devices) + 1):
        if end == len(devices) or devices[end] != devices[start]:
            last = f"-{end - 1}" if end - 1 > start else ""
            blocks.append(f"{names[devices[start]]}[{devices[start]}] {start}{last}")
            start = end
    return ", ".join(blocks)
