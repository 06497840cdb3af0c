"""The report of a case study: table.json, table.md, plots, TensorBoard events, beside the paper's figures."""

import json
import pathlib

from fmfl_jax.experiment.report.pyplot import files_only, save

# Chen et al., Table II (LLaMA-7B on WikiText-2, 20 clients): ratio of the AWQ model's fine-tuned perplexity to fp's.
PAPER_PPL_RATIO = {"adapter": 1.034, "lora": 1.010}
PAPER_COSTS = (
    "the paper's LLaMA-7B, adapter and LoRA: 3.1 to 3.5 min of fine-tuning, 21.6 to 25.3 ms per token, "
    "weights 13.6 GB, 3.7 GB with AWQ"
)

COLUMNS = {  # of table.json -> heading, format
    "weights": ("weights", "{}"),
    "peft": ("PEFT", "{}"),
    "trainable_params": ("trained params", "{:,}"),
    "fine_tune_s_per_client_round": ("fine-tuning, s per client and round", "{:.4f}"),
    "latency_ms_per_token": ("latency, ms per token", "{:.3f}"),
    "ppl_before": ("ppl before", "{:.3f}"),
    "ppl": ("ppl", "{:.3f}"),
    "bits_per_byte": ("bits per byte", "{:.4f}"),
    "weight_bytes": ("weights, MB", "{:.3f}"),
    "uplink_bytes_per_client_round": ("uplink, kB per client and round", "{:.1f}"),
    "downlink_bytes_per_client_round": ("downlink, kB per client and round", "{:.1f}"),
    "peak_memory_bytes": ("round's memory, MB", "{:.1f}"),
}
AIR_COLUMNS = {  # of a run over a network
    "air_s_per_round": ("round on the air, s", "{:.3f}"),
    "energy_j_per_client_round": ("energy, J per client and round", "{:.4f}"),
    "participation": ("participation", "{:.3f}"),
}
_UNITS = {
    "weight_bytes": 1e6,
    "peak_memory_bytes": 1e6,
    "uplink_bytes_per_client_round": 1e3,
    "downlink_bytes_per_client_round": 1e3,
}


def table_markdown(rows: list[dict]) -> str:
    """The table as Markdown, with the ratio of perplexities 4-bit / fp beside the paper's."""
    columns = COLUMNS | (AIR_COLUMNS if all(name in row for row in rows for name in AIR_COLUMNS) else {})
    cells = [[heading for heading, _ in columns.values()]]
    for row in rows:
        cells.append(
            [
                "-" if row[name] is None else form.format(row[name] / _UNITS[name] if name in _UNITS else row[name])
                for name, (_, form) in columns.items()
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines + _notes(rows)) + "\n"


def _notes(rows: list[dict]) -> list[str]:
    notes = [""]
    fp = {row["peft"]: row["ppl"] for row in rows if row["weights"] == "fp"}
    if any(row["ppl"] is None for row in rows):
        notes.append("- The base model is random: perplexities mean nothing and are left out.")
    if all(6e9 < row.get("base_params", 0) < 8e9 for row in rows):
        notes.append(f"- Beside it, {PAPER_COSTS}.")
    for row in rows:
        if row["weights"] != "fp" and row["peft"] in fp and row["ppl"] is not None:
            paper = PAPER_PPL_RATIO.get(row["peft"])
            beside = f" (paper, LLaMA-7B: {paper:.3f})" if paper and row["weights"] == "awq" else ""
            notes.append(f"- perplexity {row['weights']}/fp, {row['peft']}: {row['ppl'] / fp[row['peft']]:.3f}{beside}")
    notes.append(
        f"- Fine-tuning time: median of {min(r['fine_tune_repeats'] for r in rows)} rounds, divided by the "
        f"clients of a round; latency: median of {min(r['latency_repeats'] for r in rows)} decodes, batch 1; "
        "compilation excluded from both. The round's memory is what the compiled round needs on a device: "
        "weights, clients' batches, activations, optimizer state."
    )
    if all("participation" in row for row in rows):
        notes.append(
            "- On the air: means over the rounds. Participation: the share of a round's clients whose update was "
            "delivered. The delivery of the base model to those that had none yet took "
            f"{min(r['base_delivery_s'] for r in rows):.3f} to {max(r['base_delivery_s'] for r in rows):.3f} s "
            f"and did not reach {max(r['base_unreached'] for r in rows)} clients; it is not in the round time."
        )
    return notes


def write_report(directory: str | pathlib.Path, rows: list[dict]) -> str:
    """Writes table.json, table.md, perplexity.png, costs.png and tensorboard/ and returns the table.

    The histories of the setups are read from directory/setups/PEFT-WEIGHTS/metrics.jsonl.
    """
    directory = pathlib.Path(directory)
    histories = {f"{row['peft']}-{row['weights']}": _history(directory, row) for row in rows}
    table = table_markdown(rows)
    (directory / "table.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    (directory / "table.md").write_text(table, encoding="utf-8")
    if all(row["ppl"] is not None for row in rows):
        _plot_perplexity(directory / "perplexity.png", histories, rows)
    _plot_costs(directory / "costs.png", rows)
    _write_events(directory / "tensorboard", histories)
    return table


def _history(directory: pathlib.Path, row: dict) -> list[dict]:
    path = directory / "setups" / f"{row['peft']}-{row['weights']}" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _plot_perplexity(path: pathlib.Path, histories: dict[str, list[dict]], rows: list[dict]) -> None:
    """Perplexity by round, one line per setup: colour by PEFT, dashes for 4-bit weights."""
    fig, ax = files_only().subplots(figsize=(7, 4.5), layout="constrained")
    colors = {peft: f"C{i}" for i, peft in enumerate(dict.fromkeys(row["peft"] for row in rows))}
    for row, (name, history) in zip(rows, histories.items()):
        points = [(record["round"], record["ppl"]) for record in history if "ppl" in record]
        ax.plot(
            *zip(*points),
            color=colors[row["peft"]],
            linestyle="-" if row["weights"] == "fp" else "--",
            marker="." if len(points) < 30 else None,
            label=name,
        )
    ax.set(xlabel="round", ylabel="perplexity on the held-out text", yscale="log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.grid(alpha=0.3)
    ax.legend()
    save(fig, path)


def _plot_costs(path: pathlib.Path, rows: list[dict]) -> None:
    """Bars per setup: weights and round memory, bytes sent, fine-tuning time, latency."""
    panels = [
        ("weight_bytes", 1e6, "weights, MB"),
        ("peak_memory_bytes", 1e6, "memory of a round, MB"),
        ("uplink_bytes_per_client_round", 1e3, "uplink, kB per client and round"),
        ("fine_tune_s_per_client_round", 1e-3, "fine-tuning, ms per client and round"),
        ("latency_ms_per_token", 1.0, "latency, ms per token"),
        ("ppl", 1.0, "perplexity after fine-tuning"),
    ]
    panels = [panel for panel in panels if all(row[panel[0]] is not None for row in rows)]
    names = [f"{row['peft']}-{row['weights']}" for row in rows]
    colors = ["C0" if row["weights"] == "fp" else "C1" for row in rows]
    fig, axes = files_only().subplots(2, 3, figsize=(12, 1.6 + 0.55 * len(rows)), sharey=True, layout="constrained")
    for ax, (column, unit, title) in zip(axes.flat, panels):
        values = [row[column] / unit for row in rows]
        ax.barh(names, values, color=colors)
        for i, value in enumerate(values):
            text = f" {value:.3g}" if value < 999.5 else f" {value:,.0f}"
            ax.annotate(text, (value, i), va="center", fontsize=8)
        ax.set_title(title, fontsize=10)
        ax.margins(x=0.2)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    axes[0, 0].invert_yaxis()
    save(fig, path)


def _write_events(directory: pathlib.Path, histories: dict[str, list[dict]]) -> None:
    """One TensorBoard run per setup, made anew: a second report replaces the first."""
    from tensorboardX import SummaryWriter

    for name, history in histories.items():
        for old in (directory / name).glob("events.*"):
            old.unlink()
        with SummaryWriter(str(directory / name)) as writer:
            for record in history:
                for key, value in record.items():
                    if key not in ("round", "clients"):
                        writer.add_scalar(key, value, record["round"])
