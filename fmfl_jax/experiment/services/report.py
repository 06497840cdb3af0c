"""The report of a run of services: table.md, rows.json, summary.json and plots of accuracy over rounds and costs."""

import pathlib
from typing import Any

import numpy as np

from fmfl_jax.experiment.loop.participation import Record
from fmfl_jax.experiment.loop.records import write_json
from fmfl_jax.experiment.report.pyplot import files_only, save
from fmfl_jax.experiment.services.arm import Settings
from fmfl_jax.experiment.services.sections import (
    alignment_text,
    evaluation_text,
    markdown,
    number,
    plot_trust,
    trust_text,
)
from fmfl_jax.services.placement import SERVED

_LAST = 10  # evaluated rounds whose mean is a run's accuracy
_COLUMNS = {
    "arm": "arm",
    "accuracy": "accuracy",
    "worst": "worst client",
    "rounds": "rounds to",
    "seconds": "s to",
    "joules": "J to",
    "radio": "radio, MB",
    "fm": "FM, kB",
    "price": "FM, $",
    "served": "live / cached / fallback / none",
}
_AXES = {
    "rounds": ("round", lambda record: record["round"]),
    "seconds": ("seconds, network and FM", lambda record: record["total_seconds"]),
    "joules": ("joules, network and FM", lambda record: record["total_joules"]),
    "bytes": ("megabytes, radio and FM", lambda record: record["total_bytes"] / 1e6),
}


def last_mean(history: list[Record]) -> float:
    """Mean accuracy of the last 10 evaluated rounds: single rounds of few clients swing."""
    found = [record["accuracy"] for record in history if "accuracy" in record]
    return float(np.mean(found[-_LAST:]))


def measures(history: list[Record], target: float) -> dict:
    """A run's figures. accuracy: `last_mean`. rounds_to, seconds_to, joules_to: until the first evaluated round from
    which 10 rounds have a mean accuracy >= target, None if there is none; seconds and joules None without a network.
    first_round: the first single round that reached it. radio_bytes: up and down. fm_bytes, fm_price, fm_texts; served:
    share of the rounds with a request by placement.SERVED."""
    looks = [record for record in history if "accuracy" in record and record["round"]]
    reached = _held(looks, target)
    first = next((record["round"] for record in looks if record["accuracy"] >= target), None)
    counted = history[-1].get("total_seconds", 0.0) > 0 and "seconds" in history[-1]
    total = lambda name: float(sum(record.get(name) or 0.0 for record in history))
    asked = [record["fm_served"] for record in history if record.get("fm_served")]
    return {
        "accuracy": last_mean(history),
        "first_round": first,
        "rounds_to": None if reached is None else reached["round"],
        "seconds_to": reached["total_seconds"] if counted and reached is not None else None,
        "joules_to": reached["total_joules"] if counted and reached is not None else None,
        "radio_bytes": total("uplink_bytes") + total("downlink_bytes"),
        "fm_bytes": total("fm_bytes"),
        "fm_price": total("fm_price"),
        "fm_texts": total("fm_texts"),
        "fm_absent_classes": total("fm_absent_classes"),
        "fm_waited_s": total("fm_waited_s"),
        "fm_joules": total("fm_joules"),
        "served": {kind: asked.count(kind) / len(asked) for kind in SERVED} if asked else None,
    }


def _held(looks: list[Record], target: float) -> Record | None:
    """The first of the records from which _LAST of them (all, where there are fewer) average the target."""
    accuracy, length = [record["accuracy"] for record in looks], min(_LAST, len(looks))
    for start in range(len(looks) - length + 1):
        if np.mean(accuracy[start : start + length]) >= target:
            return looks[start]
    return None


def summarize(rows: list[dict]) -> list[dict]:
    """One row an arm: means over the seeds, accuracy_std (n - 1), and how many seeds reached the target."""
    out = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        accuracy = [row["accuracy"] for row in own]
        found = {
            "arm": arm,
            "seeds": len(own),
            "accuracy": float(np.mean(accuracy)),
            "accuracy_std": float(np.std(accuracy, ddof=1)) if len(own) > 1 else None,
            "worst_client": _mean(own, "worst_client"),
        }
        if "radio_bytes" in own[0]:
            found["radio_bytes"] = _mean(own, "radio_bytes")
        if "rounds_to" in own[0]:
            found["reached"] = sum(row["rounds_to"] is not None for row in own)
            names = (
                "first_round",
                "rounds_to",
                "seconds_to",
                "joules_to",
                "radio_bytes",
                "fm_bytes",
                "fm_price",
                "fm_texts",
                "fm_absent_classes",
                "fm_waited_s",
                "fm_joules",
            )
            found |= {name: _mean(own, name) for name in names}
            served = [row["served"] for row in own if row["served"] is not None]
            found["served"] = {k: float(np.mean([one[k] for one in served])) for k in SERVED} if served else None
        out.append(found)
    return out


def mean_figures(found: list) -> Any:
    """Of records of one form, nested at will, the mean of every number over those that have it (None where none has);
    what is the same in all stays as it is."""
    first = found[0]
    if isinstance(first, dict):
        return {name: mean_figures([one[name] for one in found]) for name in first}
    if isinstance(first, list | tuple):
        return [mean_figures(list(column)) for column in zip(*found)]
    numbers = [one for one in found if one is not None]
    if not numbers or all(one == first for one in found):
        return first
    return float(np.mean(numbers))


def table(summary: list[dict], target: float) -> str:
    """The summary as Markdown; "-": does not apply or was not counted."""
    cells = [[f"{name} {target:g}" if name.endswith(" to") else name for name in _COLUMNS.values()]]
    for row in summary:
        std = "" if row["accuracy_std"] is None else f" ± {row['accuracy_std']:.3f}"
        line = [row["arm"], f"{row['accuracy']:.3f}{std}", number(row["worst_client"], ".2f")]
        if "reached" not in row:
            radio = row.get("radio_bytes")
            cells.append(line + ["-"] * 3 + [number(None if radio is None else radio / 1e6, ".3g")] + ["-"] * 3)
            continue
        part = "" if row["reached"] == row["seeds"] else f" ({row['reached']} of {row['seeds']})"
        asked = row["served"] is not None
        line.append("never" if row["reached"] == 0 else f"{row['rounds_to']:.0f}{part}")
        line += [number(row["seconds_to"], ".3g"), number(row["joules_to"], ".3g"), f"{row['radio_bytes'] / 1e6:.3g}"]
        line += [f"{row['fm_bytes'] / 1e3:.3g}", f"{row['fm_price']:.2g}"] if asked else ["-", "-"]
        line.append(" / ".join(f"{row['served'][k]:.0%}" for k in SERVED) if asked else "-")
        cells.append(line)
    return markdown(cells)


def settings_text(settings: Settings) -> str:
    """In one line; the arms that no service asked for have FedAvg's settings and are not named."""
    said = lambda tuned: f"learning rate {tuned.client_lr:g}, {tuned.local_epochs} local steps"
    text = f"FedAvg {said(settings.fedavg)}"
    if settings.taught.server_lr:
        text += f"; with a teacher {said(settings.taught)}, the server's learning rate {settings.taught.server_lr:g}"
    if settings.silo.teacher_weight:
        text += f"; silos {said(settings.silo)}, the teacher's weight {settings.silo.teacher_weight:g}"
    return text


def write_report(directory: pathlib.Path, result, target: float, answered_by: str) -> str:
    """Writes the files and returns the table. result: a ServicesResult."""
    summary = summarize(result.rows)
    text = table(summary, target)
    if result.evaluation is not None:
        text += "\n" + evaluation_text(result.evaluation)
    for found, section, name in ((result.alignment, alignment_text, "alignment"), (result.trust, trust_text, "trust")):
        if found is not None:
            text += "\n" + section(found, result.by_seed[name])
    head = f"Answers by {answered_by}. Tuned: {settings_text(result.settings)}.\n\n"
    (directory / "table.md").write_text(head + text + "\n", encoding="utf-8")
    write_json(
        directory / "rows.json",
        {
            "answered_by": answered_by,
            "settings": {name: tuned._asdict() for name, tuned in result.settings._asdict().items()},
            "sweep": result.sweep,
            "summary": summary,
            "rows": result.rows,
            "evaluation": result.evaluation,
            "alignment": result.alignment,
            "trust": result.trust,
            "by_seed": result.by_seed,
        },
    )
    for name, (label, of) in _AXES.items():
        _plot(directory / f"accuracy_{name}.png", result.histories, label, of)
    if result.trust is not None:
        plot_trust(directory, result.trust)
    return text


def _plot(path: pathlib.Path, histories: dict[str, list[list[Record]]], label: str, of) -> None:
    """Accuracy of the first seed of every arm."""
    fig, ax = files_only().subplots(figsize=(8, 5), layout="constrained")
    for name, runs in histories.items():
        points = [(of(r), r["accuracy"]) for r in with_total_bytes(runs[0]) if "accuracy" in r]
        x, y = zip(*points)
        if max(x) > 0:
            ax.plot(x, y, label=name, linewidth=1, linestyle="--" if "labels" in name else "-")
    ax.set(xlabel=label, ylabel="accuracy on the test rows", ylim=(0, 1))
    ax.grid(alpha=0.3)
    if ax.lines:
        ax.legend(fontsize=8)
    save(fig, path, dpi=110)


def with_total_bytes(history: list[Record]) -> list[Record]:
    """The records with total_bytes since the start, of radio and FM."""
    total, out = 0.0, []
    for record in history:
        total += sum(record.get(name) or 0.0 for name in ("uplink_bytes", "downlink_bytes", "fm_bytes"))
        out.append(record | {"total_bytes": total})
    return out


def _mean(rows: list[dict], name: str) -> float | None:
    found = [row[name] for row in rows if row[name] is not None]
    return float(np.mean(found)) if found else None
