"""Matplotlib, imported at the first plot: it takes most of a second, and a command that is refused draws nothing."""

import pathlib


def files_only():
    """matplotlib.pyplot for files: a report is written on machines without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(fig, path: pathlib.Path, *, dpi: int = 150) -> None:
    """Writes the figure and lets go of it."""
    fig.savefig(path, dpi=dpi)
    files_only().close(fig)
