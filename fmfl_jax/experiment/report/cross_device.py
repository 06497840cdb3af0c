"""The report of a run of small models: row.json and accuracy.png, and contributions.png where they are measured."""

import pathlib

import jax
import numpy as np

from fmfl_jax.data.classification import Task
from fmfl_jax.experiment.build.contributions import totals
from fmfl_jax.experiment.config.client_counts import client_counts
from fmfl_jax.experiment.config.cross_device import CrossDeviceConfig
from fmfl_jax.experiment.cross_device import CrossDeviceResult
from fmfl_jax.experiment.loop.market import payment_columns
from fmfl_jax.experiment.loop.records import write_json
from fmfl_jax.experiment.report.contributions import plot_contributions
from fmfl_jax.experiment.report.pyplot import files_only, save

# Of the last evaluated round's record, in the row where the federation has them.
COLUMNS = (
    "epsilon",
    "epsilon_rdp",
    "delta",
    "client_accuracy_mean",
    "client_accuracy_worst_decile",
    "client_nll_std",
    "client_shared_accuracy_mean",
    "seconds",
    "joules",
    "total_uplink_bytes",
    "sim_seconds",
    "secure_bytes_up",
)


def write_report(
    directory: str | pathlib.Path,
    config: CrossDeviceConfig,
    task: Task,
    result: CrossDeviceResult,
    centralized: CrossDeviceResult | None,
) -> dict:
    """Writes accuracy.png and row.json and returns the row. round_s: median over the rounds."""
    directory, looks = pathlib.Path(directory), [record for record in result.history if "accuracy" in record]
    sizes = task.shards.sizes
    times = [record["round_s"] for record in result.history[1:] if record["round_s"] is not None]
    row = {
        "algorithm": config.name,
        "execution": result.execution,
        "clients": len(sizes),
        "rows_per_client": {"min": int(sizes.min()), "median": float(np.median(sizes)), "max": int(sizes.max())},
        "rounds": config.num_rounds,
        "params": sum(x.size for x in jax.tree.leaves(result.state.params)),
        "accuracy_before": looks[0]["accuracy"],
        "accuracy": looks[-1]["accuracy"],
        "nll": looks[-1]["nll"],
        "best_accuracy": max(record["accuracy"] for record in looks),
        "centralized_accuracy": None if centralized is None else centralized.history[-1]["accuracy"],
        "best_centralized_accuracy": None if centralized is None else max(r["accuracy"] for r in centralized.history),
        "round_s": float(np.median(times)) if times else None,
    }
    row |= client_counts(config.federation, num_clients=len(sizes), cohort_size=config.cohort_size).record()
    row |= {name: looks[-1][name] for name in COLUMNS if name in looks[-1]} | payment_columns(result.history[1:])
    if (method := config.federation.contribution) is not None:
        values = totals(method, result.history, num_clients=len(sizes), seed=config.seed)
        row["contributions"] = values.tolist()
        if jax.process_index() == 0:
            plot_contributions(directory / "contributions.png", row["contributions"])
    write_json(directory / "row.json", row)
    if jax.process_index() == 0:
        _plot(directory / "accuracy.png", config.name, looks, row["centralized_accuracy"])
    return row


def _plot(path: pathlib.Path, name: str, looks: list[dict], centralized: float | None) -> None:
    """Test accuracy by round, the centralized one as a dashed line."""
    fig, ax = files_only().subplots(figsize=(7, 4.5), layout="constrained")
    ax.plot(
        [record["round"] for record in looks],
        [record["accuracy"] for record in looks],
        marker="." if len(looks) < 30 else None,
        label=name,
    )
    if centralized is not None:
        ax.axhline(centralized, color="black", linestyle="--", label="all data in one place")
    ax.set(xlabel="round", ylabel="accuracy on the test rows", ylim=(0, 1))
    ax.grid(alpha=0.3)
    ax.legend()
    save(fig, path, dpi=120)
