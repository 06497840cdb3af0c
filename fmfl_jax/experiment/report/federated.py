"""The report of one federated run: its figures in one folder, and plots of what perplexity cost."""

import json
import pathlib
import shutil

from fmfl_jax.experiment.loop.records import write_json
from fmfl_jax.experiment.report.contributions import plot_contributions
from fmfl_jax.experiment.report.pyplot import files_only, save

_PHASES = {"downlink": "C0", "compute": "C2", "wait": "0.85", "uplink": "C1"}
_MAX_BARS = 20


def write_federated_report(directory: str | pathlib.Path, row: dict) -> list[str]:
    """Writes metrics.jsonl, row.json, costs.png and, over a network, participation.png and timeline.png, where they are
    measured contributions.png; returns the files' names.

    Reads the folder directory/setups/PEFT-WEIGHTS that the run left.
    """
    directory = pathlib.Path(directory)
    setup = directory / "setups" / f"{row['peft']}-{row['weights']}"
    history = [json.loads(line) for line in (setup / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shutil.copyfile(setup / "metrics.jsonl", directory / "metrics.jsonl")
    write_json(directory / "row.json", row)
    plot_costs(directory / "costs.png", history)
    names = ["metrics.jsonl", "row.json", "config.json", "costs.png"]
    if "participation" in row:
        plot_participation(directory / "participation.png", history)
        names.append("participation.png")
    if (setup / "timeline.json").exists():
        plot_timeline(directory / "timeline.png", json.loads((setup / "timeline.json").read_text(encoding="utf-8")))
        names.append("timeline.png")
    if "contributions" in row:
        plot_contributions(directory / "contributions.png", row["contributions"])
        names.append("contributions.png")
    return names


def with_totals(history: list[dict]) -> list[dict]:
    """The records with "total_uplink_bytes", which only a network counts by itself, and, where clients are paid,
    "total_paid_usd"."""
    total, paid, records = 0.0, 0.0, []
    market = any("paid_usd" in record for record in history)
    for record in history:
        total += record.get("uplink_bytes", 0.0)
        paid += record.get("paid_usd", 0.0)
        records.append({"total_uplink_bytes": total} | ({"total_paid_usd": paid} if market else {}) | record)
    return records


def plot_costs(path: pathlib.Path, history: list[dict]) -> None:
    """Perplexity against rounds and uplink bytes; over a network against seconds and the clients' joules too, and what
    they were paid. Of personal models the mean and the worst decile beside the shared model."""
    points = [record for record in with_totals(history) if "ppl" in record]
    axes_of = [
        ("round", 1.0, "round"),
        ("seconds", 1.0, "seconds on the network, base delivery included"),
        ("sim_seconds", 1.0, "seconds of the asynchronous schedule"),
        ("joules", 1.0, "joules of all clients"),
        ("total_uplink_bytes", 1e6, "uplink, MB of all clients"),
        ("total_paid_usd", 1.0, "USD paid to the clients"),
    ]
    axes_of = [axis for axis in axes_of if all(axis[0] in p for p in points)]
    lines = {
        "ppl": "shared model",
        "client_ppl_mean": "personal models, mean",
        "client_ppl_worst_decile": "personal models, worst decile",
        "client_shared_ppl_mean": "shared model on the clients' text",
    }
    fig, axes = files_only().subplots(
        1, len(axes_of), figsize=(1 + 4 * len(axes_of), 4), sharey=True, layout="constrained"
    )
    for ax, (name, unit, label) in zip(axes, axes_of):
        for line, title in lines.items():
            if all(line in p for p in points):
                ax.plot(
                    [p[name] / unit for p in points],
                    [p[line] for p in points],
                    label=title,
                    marker="." if len(points) < 60 else None,
                )
        ax.set(xlabel=label, xlim=(0, None))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("perplexity on the held-out text")
    if "client_ppl_mean" in points[-1]:
        axes[0].legend(fontsize=8)
    save(fig, path)


def plot_participation(path: pathlib.Path, history: list[dict]) -> None:
    """Shares of the cohort by round: delivered, not delivered though able, device too small. One stack per round."""
    rounds = [record for record in history if "participation" in record]
    parts = {
        "participation": ("delivered", "C2"),
        "outage": ("not delivered: out of reach, late, lost or not scheduled", "C1"),
        "cannot_hold": ("device cannot hold the job", "0.6"),
    }
    fig, ax = files_only().subplots(figsize=(8, 3.5), layout="constrained")
    shares = [[record[name] for record in rounds] for name in parts]
    edges = [record["round"] - 0.5 for record in rounds] + [rounds[-1]["round"] + 0.5]
    shares = [values + values[-1:] for values in shares]
    ax.stackplot(
        edges, shares, labels=[label for label, _ in parts.values()], colors=[c for _, c in parts.values()], step="post"
    )
    ax.set(xlabel="round", ylabel="share of the cohort", xlim=(edges[0], edges[-1]), ylim=(0, 1))
    ax.locator_params(axis="x", integer=True)
    fig.legend(loc="outside upper center", ncols=3, fontsize=8)
    save(fig, path)


def plot_timeline(path: pathlib.Path, timeline: dict) -> None:
    """Who waited for whom in the last round: a bar per client, the slowest on top, cut off where the round closed."""
    ids, delivered = timeline["client_ids"][:_MAX_BARS], timeline["delivered"][:_MAX_BARS]
    fig, ax = files_only().subplots(figsize=(8, 1.7 + 0.25 * max(len(ids), 2)), layout="constrained")
    names = [f"client {i}" + ("" if arrived else " (not delivered)") for i, arrived in zip(ids, delivered)]
    left = [0.0] * len(ids)
    for phase, color in _PHASES.items():
        values = timeline[phase][:_MAX_BARS]
        ax.barh(names, values, left=left, color=color, label={"wait": "wait for the channel"}.get(phase, phase))
        left = [a + b for a, b in zip(left, values)]
    if not ids:
        ax.text(0.5, 0.5, "nobody took part", ha="center", transform=ax.transAxes)
        ax.set_yticks([])
    ax.axvline(timeline["latency_s"], color="k", linewidth=1, label="round closed")
    if timeline["deadline_s"] is not None:
        ax.axvline(timeline["deadline_s"], color="C3", linestyle="--", label="deadline")
    ax.invert_yaxis()
    ax.set_xlabel(
        f"seconds into the last round (the {len(ids)} slowest of {len(timeline['client_ids'])} that took part)"
    )
    fig.legend(loc="outside upper center", ncols=6, fontsize=8)
    save(fig, path)
