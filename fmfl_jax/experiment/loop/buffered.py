"""Who fills FedBuff's buffer, and when: an event simulation that does not depend on what is learned.

`concurrency` clients work at any time. One that is done puts its update into the buffer and another, drawn from those
that are neither working nor in the buffer, starts from the present parameters. When the buffer holds K updates the
server steps. Everything follows from the seed and the clients' durations, so a stopped run replays it.
"""

import dataclasses
import heapq
from typing import NamedTuple

import numpy as np

from fmfl_jax import streams
from fmfl_jax.experiment.loop.participation import Participation, Record
from fmfl_jax.fed.algorithms.fed_buff import staleness_weight
from fmfl_jax.finite import finite_fields


class ScheduleState(NamedTuple):
    """working: heap of (seconds when done, client, version started from). now: seconds. starts: how many so far, of all
    clients. selection: nothing that a checkpoint would need."""

    working: tuple
    now: float
    starts: int
    selection: dict


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class BufferedSchedule:
    """The schedule of an asynchronous server (see `Schedule`). durations_s: [num_clients], mean seconds of a client's
    work, inf for those that cannot take part; each attempt varies log-normally by `spread`. start_s: when the first
    start."""

    durations_s: np.ndarray
    buffer_size: int
    concurrency: int
    seed: int
    spread: float = 0.25
    start_s: float = 0.0

    def __post_init__(self):
        reachable = int(np.sum(np.isfinite(self.durations_s)))
        if not 1 <= self.buffer_size or reachable < self.buffer_size:
            raise ValueError(
                f"FedBuff's buffer of {self.buffer_size} needs as many clients that can take part, of which "
                f"there are {reachable}"
            )
        if self.concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {self.concurrency}")

    @property
    def learns(self) -> bool:
        return False

    def extra_types(self) -> dict[str, type]:
        return {}

    def capacity(self, num_rounds: int) -> int:
        """Clients of a round."""
        del num_rounds
        return self.buffer_size

    def start(self) -> tuple[ScheduleState, dict]:
        """Before the first server step."""
        return ScheduleState((), self.start_s, 0, {}), {"sim_seconds": self.start_s}

    def draw(
        self, state: ScheduleState, round: int, uplink_bits: np.ndarray | None = None
    ) -> tuple[ScheduleState, Participation]:
        """The updates that fill the buffer for server step `round`, and the clients that start from version `round`."""
        del uplink_bits  # the durations are the run's
        working, now, starts = list(state.working), state.now, state.starts
        buffer, starting = {}, []
        while len(buffer) < self.buffer_size:
            while len(working) < self.concurrency and (client := self._next(working, buffer, starts)) is not None:
                rng = streams.host_rng(streams.ASYNC_DURATION, self.seed, starts)
                seconds = self.durations_s[client] * np.exp(self.spread * rng.standard_normal())
                heapq.heappush(working, (now + float(seconds), client, round))
                starting.append(client)
                starts += 1
            now, client, version = heapq.heappop(working)
            buffer[client] = round - version
        ids = np.asarray(sorted(buffer), np.int32)
        staleness = np.asarray([buffer[client] for client in ids.tolist()])
        record = {"sim_seconds": now, "staleness": float(staleness.mean()), "staleness_max": int(staleness.max())}
        participation = Participation(
            ids,
            staleness_weight(staleness),
            np.ones(len(ids), np.float32),
            np.ones(len(ids), bool),
            {},
            record,
            starting=np.asarray(starting, np.int32),
        )
        return ScheduleState(tuple(working), now, starts, {}), participation

    def replay(self, state: ScheduleState, history: list[Record]) -> tuple[ScheduleState, Participation | None]:
        """The schedule after as many server steps, and the last one."""
        participation = None
        for round in range(len(history)):
            state, participation = self.draw(state, round)
        return state, participation

    def observe(self, state: ScheduleState, participation: Participation, losses: np.ndarray) -> ScheduleState:
        """Nothing is learned from a step."""
        return state

    def _next(self, working: list, buffer: dict, starts: int) -> int | None:
        """A client that is free to start; None where there is none."""
        busy = np.asarray([client for _, client, _ in working] + list(buffer), np.int64)
        free = np.isfinite(self.durations_s)
        free[busy] = False
        free = np.flatnonzero(free)
        return int(streams.host_rng(streams.ASYNC_START, self.seed, starts).choice(free)) if len(free) else None
