"""The report of a plan: a table, and a map of what dominates a round."""

import pathlib

from fmfl_jax.experiment.report.pyplot import files_only, save

_COLORS = {
    "downlink": "#8fbbe0",
    "compute": "#9ed49e",
    "wait": "#e3e3e3",
    "uplink": "#f7b77a",
    "nothing arrives": "#ea9999",
    "device too small": "#a6a6a6",
}


def duration(seconds: float | None) -> str:
    """For reading: 12 ms, 3.4 s, 5.1 min, 2.3 h."""
    if seconds is None:
        return "-"
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds * 1e3:.3g} ms"


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    cells = [
        [
            "weights",
            "PEFT",
            "network",
            "device",
            "memory, GB of",
            "fits",
            "uplink, MB",
            "round",
            "J per client",
            "outage",
            "dominates",
            "base delivery",
        ]
    ]
    for row in rows:
        energy, outage = row["energy_j_per_client"], row["outage"]
        missed = f", {row['base_unreached']} not reached" if row["base_unreached"] else ""
        base = duration(row["base_delivery_s"]) + missed
        cells.append(
            [
                row["weights"],
                row["peft"],
                row["network"],
                row["device"],
                f"{row['memory_bytes'] / 1e9:.2f} of {row['device_memory_bytes'] / 1e9:.0f}",
                "yes" if row["fits"] else "to answer only" if row["fits_to_answer"] else "no",
                f"{row['uplink_bytes'] / 1e6:.3f}",
                duration(row["round_s"]),
                "-" if energy is None else f"{energy:.4g}",
                "-" if outage is None else f"{outage:.1%}",
                row["dominates"] or "-",
                base,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def regime(row: dict) -> str:
    """What decides: the dominating phase, or why there is no round."""
    if not row["fits"]:
        return "device too small"
    return "nothing arrives" if row["outage"] == 1.0 else row["dominates"]


def plot_regimes(path: pathlib.Path, rows: list[dict], *, title: str) -> None:
    """Device class x PEFT x network, a panel per weight format: colour by what dominates; round time and outage
    inside."""
    from matplotlib.patches import Rectangle

    forms = list(dict.fromkeys(row["weights"] for row in rows))
    places = list(dict.fromkeys((row["network"], row["device"]) for row in rows))
    pefts = list(dict.fromkeys(row["peft"] for row in rows))
    fig, axes = files_only().subplots(
        len(forms),
        1,
        figsize=(3.2 + 1.25 * len(places), 1.6 + len(forms) * (0.9 + 0.5 * len(pefts))),
        squeeze=False,
        layout="constrained",
    )
    for ax, form in zip(axes[:, 0], forms):
        for row in rows:
            if row["weights"] != form:
                continue
            x, y = places.index((row["network"], row["device"])), pefts.index(row["peft"])
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=_COLORS[regime(row)], edgecolor="white"))
            text = f"{row['memory_bytes'] / 1e9:.1f} GB" if not row["fits"] else duration(row["round_s"])
            lost = f"\n{row['outage']:.0%} undelivered" if row["outage"] else ""
            ax.text(x, y, text + lost, ha="center", va="center", fontsize=8)
        ax.set(xlim=(-0.5, len(places) - 0.5), ylim=(len(pefts) - 0.5, -0.5), title=f"{form} weights")
        ax.set_xticks(range(len(places)), [f"{device}\n{network}" for network, device in places])
        ax.set_yticks(range(len(pefts)), pefts)
    used = {regime(row) for row in rows}
    fig.legend(
        handles=[Rectangle((0, 0), 1, 1, color=c, label=name) for name, c in _COLORS.items() if name in used],
        loc="outside lower center",
        ncols=3,
        fontsize=8,
    )
    fig.suptitle(title, fontsize=10)
    save(fig, path)
