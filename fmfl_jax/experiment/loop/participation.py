"""Who takes part in a round, with what weight, and who is heard: selection and network joined.

Everything follows from (seed, round), what was observed before, and nothing else. A selector's state is checkpointed;
the network is played again from the recorded cohorts, which is cheap beside training and exact.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fmfl_jax.experiment.network import rounds as over_air
from fmfl_jax.experiment.network.rounds import Air, AirState
from fmfl_jax.fed.selection import Selector
from fmfl_jax.wireless.simulate import RoundOutcome


class Turn(NamedTuple):
    """The clients of a round. client_ids: int32 [K], sorted; K may be 0. weights: float32 [K]. normalizers: float32 [K]
    or None. heard: bool [K]. extras: {name: [K, ...]}. record: figures for metrics.jsonl. outcome: the network's, or
    None.
    starting: int [J], clients that begin from the server's parameters before this round (asynchronous runs)."""

    client_ids: np.ndarray
    weights: np.ndarray
    normalizers: np.ndarray | None
    heard: np.ndarray
    extras: dict
    record: dict
    outcome: RoundOutcome | None = None
    starting: np.ndarray | None = None


class TurnsState(NamedTuple):
    """selection: the selector's, {name: numpy array}, checkpointed. air: the network's, played again; None without."""

    selection: dict
    air: AirState | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turns:
    """sizes: float32 [num_clients], each client's number of examples. weigh(sizes [K]) -> weights [K]; None: the sizes
    themselves."""

    selector: Selector
    sizes: np.ndarray
    seed: int
    air: Air | None = None
    weigh: Callable | None = None

    def capacity(self, num_rounds: int) -> int:
        """The most clients that any of the rounds has."""
        return self.selector.capacity(len(self.sizes), num_rounds=num_rounds, seed=self.seed)

    def start(self) -> tuple[TurnsState, dict]:
        """Before round 0: (state, figures of the base model's delivery)."""
        air = None if self.air is None else over_air.start(self.air, self.seed)
        return TurnsState(self.selector.init(len(self.sizes)), air), {} if air is None else over_air.spent(
            self.air, air
        )

    def turn(self, state: TurnsState, round: int) -> tuple[TurnsState, Turn]:
        """Selects and, over a network, plays the round."""
        predicted = None
        if self.selector.needs_prediction:
            predicted = over_air.predicted_s(self.air, state.air, self.capacity(round + 1))
        return self._play(
            state, round, self.selector.select(state.selection, round=round, seed=self.seed, predicted_s=predicted)
        )

    def replay(self, state: TurnsState, cohorts: list[np.ndarray]) -> tuple[TurnsState, Turn | None]:
        """The network after these rounds, and the last turn."""
        turn = None
        if self.air is not None:
            for round, ids in enumerate(cohorts):
                state, turn = self._play(state, round, ids)
        return state, turn

    def observe(self, state: TurnsState, turn: Turn, losses: np.ndarray) -> TurnsState:
        """What the selector learns from a round. losses: float32 [K]."""
        seconds = np.zeros(len(losses), np.float32) if turn.outcome is None else turn.outcome.finish_s[turn.client_ids]
        heard = turn.heard
        return state._replace(
            selection=self.selector.observe(state.selection, turn.client_ids[heard], losses[heard], seconds[heard])
        )

    def _play(self, state: TurnsState, round: int, ids: np.ndarray) -> tuple[TurnsState, Turn]:
        ids = np.asarray(ids, np.int32)
        examples = self.sizes[ids] if self.weigh is None else np.asarray(self.weigh(self.sizes[ids]), np.float32)
        if self.air is None:
            return state, Turn(ids, examples, None, np.ones(len(ids), bool), {}, {})
        air, outcome = over_air.play_round(
            self.air, state.air, round=round, seed=self.seed, client_ids=ids, num_examples=examples
        )
        told = over_air.cohort_weights(self.air, outcome, ids, examples)
        extras = {}
        if self.air.analog:
            extras["snr"] = over_air.analog_snr(self.air, state.air, round=round, seed=self.seed)[ids]
        return state._replace(air=air), Turn(ids, *told, extras, over_air.record(self.air, air, outcome, ids), outcome)
