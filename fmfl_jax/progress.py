"""How far a long piece of work is: a bar on a terminal, a plain line now and then where the output is a file."""

import sys
import time
from collections.abc import Iterable, Iterator

import jax
from tqdm import tqdm

_BAR_DELAY_S = 2.0  # what is done sooner shows no bar


class Progress:
    """total: steps of the whole work, `done` of them from before (a run that goes on). Writes to stderr, from the first
    of several processes.

    A line reads "awq: 12 of 30 blocks, 61 s, about 92 s left, loss 2.310". There is none in the first
    seconds_between_lines; with 0 there is one for each step.
    """

    def __init__(self, total: int, *, label: str, unit: str, done: int = 0, seconds_between_lines: float = 60.0):
        self._total, self._label, self._unit, self._done = total, label, unit, done
        self._seconds_between_lines = seconds_between_lines
        self._figures, self._start, self._before = "", time.monotonic(), done
        self._last = self._start
        self._bar = None
        if sys.stderr.isatty() and jax.process_index() == 0:
            # leave=None: a bar within another one goes when it is done.
            self._bar = tqdm(total=total, desc=label, unit=unit, initial=done, delay=_BAR_DELAY_S, leave=None)

    def track(self, items: Iterable) -> Iterator:
        """Yields the items, each one step of the work."""
        for item in items:
            yield item
            self.advance()
        self.close()

    def show(self, **figures: str) -> None:
        """What is written beside the count from now on, e.g. loss="2.310"."""
        self._figures = "".join(f", {name} {value}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.set_postfix(figures, refresh=False)

    def advance(self) -> None:
        """One step more is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
            return
        now = time.monotonic()
        if now - self._last < self._seconds_between_lines or jax.process_index() != 0:
            return
        self._last, seconds = now, now - self._start
        left = seconds / (self._done - self._before) * (self._total - self._done)
        print(
            f"{self._label}: {self._done} of {self._total} {self._unit}s, {seconds:.0f} s, about {left:.0f} s left"
            f"{self._figures}",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()
