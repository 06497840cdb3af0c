"""Matplotlib, imported at the first plot: it takes most of a second, and a command that is refused draws nothing."""


def files_only():
    """matplotlib.pyplot for files: a report is written on machines without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
