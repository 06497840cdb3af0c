"""Contributions of clients as a plot and a line."""

import pathlib

import numpy as np

from fmfl_jax.experiment.report.pyplot import files_only, save


def plot_contributions(path: pathlib.Path, values: list[float]) -> None:
    """A bar per client, from the one that did most for the model to the one that did most against it."""
    order = np.argsort(-np.asarray(values), kind="stable")
    sorted_values = np.asarray(values)[order]
    fig, ax = files_only().subplots(figsize=(max(4.0, 1.5 + 0.25 * min(len(order), 60)), 3.5), layout="constrained")
    ax.bar(range(len(order)), sorted_values, color=np.where(sorted_values < 0, "C3", "C2"))
    if len(order) <= 60:
        ax.set_xticks(range(len(order)), [str(client) for client in order], fontsize=7)
    ax.axhline(0, color="k", linewidth=0.8)
    ax.set(xlabel="client", ylabel="contribution, nats of held-out loss")
    save(fig, path)


def contribution_line(values: list[float]) -> str:
    """Who did most, who did harm."""
    values_of = np.asarray(values)
    best, harmful = int(np.argmax(values_of)), np.flatnonzero(values_of < 0)
    most = f"client {best} contributed most ({values_of[best]:+.3g} nats)"
    if not len(harmful):
        return f"contributions: {most}, nobody did harm"
    worst = harmful[np.argsort(values_of[harmful], kind="stable")][:5]
    named = ", ".join(f"{client} ({values_of[client]:+.3g})" for client in worst)
    more = "" if len(harmful) == len(worst) else f" and {len(harmful) - len(worst)} more"
    return f"contributions: {most}; below 0: clients {named}{more}"
