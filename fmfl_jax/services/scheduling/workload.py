"""Requests of several tasks, each with its own lengths of prompts and answers.

>>> tasks = [Task(share=0.8, prompt=60, output=4, limit=8), Task(share=0.2, prompt=200, output=55, limit=256)]
>>> draw_workload(tasks, Poisson(0.5), 1000, rng)
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fmfl_jax.finite import finite_fields
from fmfl_jax.services.checks import at_least, positive
from fmfl_jax.services.latency import LogNormal
from fmfl_jax.services.scheduling.arrivals import Arrivals
from fmfl_jax.services.scheduling.requests import Requests


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class Task:
    """share: of the requests, over the sum of all shares. prompt, output: median tokens, log-normal with standard
    deviations prompt_sigma and output_sigma of the logarithm (`latency.fit_log_normal` fits them); prompt_limit and
    limit cut them. deadline_s: after the arrival; None: there is none. priority: 0 comes first."""

    share: float = 1.0
    prompt: float = 60.0
    prompt_sigma: float = 0.5
    prompt_limit: int = 256
    output: float = 55.0
    output_sigma: float = 1.0
    limit: int = 256
    deadline_s: float | None = None
    priority: int = 0

    def __post_init__(self):
        positive(share=self.share, prompt=self.prompt, output=self.output)
        at_least(0, prompt_sigma=self.prompt_sigma, output_sigma=self.output_sigma)
        at_least(1, prompt_limit=self.prompt_limit, limit=self.limit)
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ValueError(f"deadline_s={self.deadline_s}: expected above 0, after the arrival")


class Workload(NamedTuple):
    """requests; prompt_tokens, output_tokens and task int64 [n]."""

    requests: Requests
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    task: np.ndarray


def draw_workload(tasks: Sequence[Task], arrivals: Arrivals, count: int, rng: np.random.Generator) -> Workload:
    """count requests. Raises ValueError where there are no tasks."""
    if not tasks:
        raise ValueError("no task: at least one is needed")
    at_least(1, count=count)
    arrivals_s = arrivals.draw(count, rng)
    shares = np.asarray([task.share for task in tasks])
    task = rng.choice(len(tasks), count, p=shares / shares.sum())
    prompt, output = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for number, t in enumerate(tasks):
        rows = np.flatnonzero(task == number)
        prompt[rows] = _lengths(LogNormal(math.log(t.prompt), t.prompt_sigma), t.prompt_limit, len(rows), rng)
        output[rows] = _lengths(LogNormal(math.log(t.output), t.output_sigma), t.limit, len(rows), rng)
    within_s = np.asarray([math.inf if t.deadline_s is None else t.deadline_s for t in tasks])
    requests = Requests(
        arrivals_s=arrivals_s,
        priorities=np.asarray([t.priority for t in tasks])[task],
        deadlines_s=arrivals_s + within_s[task],
    )
    return Workload(requests, prompt, output, task)


def _lengths(lengths: LogNormal, limit: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [count] in 1..limit."""
    drawn = np.rint(rng.lognormal(lengths.mu, lengths.sigma, count))
    return np.clip(drawn, 1, limit).astype(np.int64)
