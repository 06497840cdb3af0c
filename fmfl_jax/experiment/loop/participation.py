"""Who takes part in a round, with what weight, and whose update is delivered: selection and network joined.

Everything follows from (seed, round), what was observed before, and nothing else. A selector's state is checkpointed;
the network is played again from the recorded cohorts, which is cheap beside training and exact.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from fmfl_jax.experiment.loop.market import Market
from fmfl_jax.experiment.network import rounds as network_rounds
from fmfl_jax.experiment.network.rounds import JobState, NetworkJob
from fmfl_jax.fed.selection import Selector, SelectorState
from fmfl_jax.wireless.simulate import RoundOutcome

Record = dict[str, Any]  # figures of a round, for metrics.jsonl


class Participation(NamedTuple):
    """The clients of a round. client_ids: int32 [K], sorted; K may be 0. weights: float32 [K]. denominators: float32
    [K] or None. delivered: bool [K]. extras: {name: [K, ...]}, see Cohort. record: figures for metrics.jsonl. outcome:
    the network's, or None. starting: int [J], clients that begin from the server's parameters before this round
    (asynchronous servers)."""

    client_ids: np.ndarray
    weights: np.ndarray
    denominators: np.ndarray | None
    delivered: np.ndarray
    extras: dict[str, np.ndarray]
    record: Record
    outcome: RoundOutcome | None = None
    starting: np.ndarray | None = None


class Schedule[State](Protocol):
    """Who takes part in which round. A State's field `selection`, {name: numpy array}, is checkpointed; the rest is
    played again. learns: whether `observe` must be given every round before the next."""

    @property
    def learns(self) -> bool: ...

    def capacity(self, num_rounds: int) -> int:
        """The most clients that any of the rounds has."""
        ...

    def extra_types(self) -> dict[str, type]:
        """Of the extras, to compile a round for."""
        ...

    def start(self) -> tuple[State, Record]:
        """Before round 0: (state, figures)."""
        ...

    def draw(self, state: State, round: int, uplink_bits: np.ndarray | None = None) -> tuple[State, Participation]:
        """The clients of a round. uplink_bits: [num_clients], of their updates, where they change between rounds."""
        ...

    def replay(self, state: State, history: list[Record]) -> tuple[State, Participation | None]:
        """The state after the recorded rounds, and the last of them."""
        ...

    def observe(self, state: State, participation: Participation, losses: np.ndarray) -> State:
        """What is learned from a round. losses: float32 [K]."""
        ...


class CohortState(NamedTuple):
    """selection: the selector's. network: the network's, played again; None without."""

    selection: SelectorState
    network: JobState | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CohortSchedule:
    """A schedule of cohorts that a selector draws. sizes: float32 [num_clients], each client's number of examples.
    weighting(sizes [K]) -> weights [K]; None: the sizes themselves. quorum(cohort size) -> how many updates must be
    delivered; with fewer the round is void. market: takes the clients on and pays them in place of the selector; it
    needs the job. everybody_first: in round 0 all clients take part, whatever the selector says."""

    selector: Selector
    sizes: np.ndarray
    seed: int
    job: NetworkJob | None = None
    weighting: Callable[[np.ndarray], np.ndarray] | None = None
    quorum: Callable[[int], int] | None = None
    market: Market | None = None
    everybody_first: bool = False

    def __post_init__(self):
        if self.market is not None and (self.job is None or self.everybody_first):
            raise ValueError("a market takes on clients for the energy of a network's round, in every round")
        if self.job is not None and self.job.network.num_clients != len(self.sizes):
            raise ValueError(f"the network has {self.job.network.num_clients} clients, the data {len(self.sizes)}")

    @property
    def learns(self) -> bool:
        return self.selector.learns

    def capacity(self, num_rounds: int) -> int:
        drawn = self.selector.capacity(len(self.sizes), num_rounds=num_rounds, seed=self.seed)
        return len(self.sizes) if self.everybody_first else drawn

    def extra_types(self) -> dict[str, type]:
        return {"snr": np.float32} if self.job is not None and self.job.analog else {}

    def start(self) -> tuple[CohortState, Record]:
        """The figures are those of the base model's delivery, and of what clients ask. Raises ValueError where a market
        takes on nobody."""
        selection = self.selector.init(len(self.sizes))
        if self.job is None:
            return CohortState(selection, None), {}
        network = network_rounds.start(self.job, self.seed)
        figures = network_rounds.totals(self.job, network)
        if self.market is not None:
            figures |= self.market.opening(self._expected_j(self.job, network, 0))
        return CohortState(selection, network), figures

    def draw(
        self, state: CohortState, round: int, uplink_bits: np.ndarray | None = None
    ) -> tuple[CohortState, Participation]:
        if self.market is not None:
            return self._draw_from_market(self.market, state, round, uplink_bits)
        if self.everybody_first and round == 0:
            return self._play(state, round, np.arange(len(self.sizes)), uplink_bits)
        predicted = None
        if self.selector.needs_prediction:
            if self.job is None or state.network is None:
                raise ValueError("this selection predicts each client's round: it needs a network")
            capacity = self.capacity(round + 1)
            predicted = network_rounds.predicted_s(self.job, state.network, capacity, uplink_bits)
        ids = self.selector.select(state.selection, round=round, seed=self.seed, predicted_s=predicted)
        return self._play(state, round, ids, uplink_bits)

    def _draw_from_market(
        self, market: Market, state: CohortState, round: int, uplink_bits: np.ndarray | None
    ) -> tuple[CohortState, Participation]:
        assert self.job is not None and state.network is not None  # a market has them
        energy_j = self._expected_j(self.job, state.network, round, uplink_bits)
        recruits = market.recruit(energy_j, round=round, seed=self.seed)
        state, participation = self._play(state, round, recruits.client_ids, uplink_bits)
        assert participation.outcome is not None  # there is a network
        paid = market.figures(recruits, participation.outcome)
        return state, participation._replace(record=participation.record | paid)

    def _expected_j(
        self, job: NetworkJob, state: JobState, round: int, uplink_bits: np.ndarray | None = None
    ) -> np.ndarray:
        """What the round takes of each client, by which it asks."""
        return network_rounds.expected_j(
            job,
            state,
            round=round,
            seed=self.seed,
            cohort_size=self.capacity(round + 1),
            num_examples=self._examples(self.sizes),
            uplink_bits=uplink_bits,
        )

    def replay(self, state: CohortState, history: list[Record]) -> tuple[CohortState, Participation | None]:
        participation = None
        if self.job is not None:
            for round, record in enumerate(history):
                ids, uplink_bits = np.asarray(record["clients"], np.int32), None
                if "planned_uplink_bits" in record:
                    uplink_bits = np.zeros(len(self.sizes), np.int64)
                    uplink_bits[ids] = record["planned_uplink_bits"]
                state, participation = self._play(state, round, ids, uplink_bits)
        return state, participation

    def observe(self, state: CohortState, participation: Participation, losses: np.ndarray) -> CohortState:
        ids, delivered, outcome = participation.client_ids, participation.delivered, participation.outcome
        seconds = np.zeros(len(losses), np.float32) if outcome is None else np.asarray(outcome.finish_s)[ids]
        selection = self.selector.observe(state.selection, ids[delivered], losses[delivered], seconds[delivered])
        return state._replace(selection=selection)

    def _examples(self, sizes: np.ndarray) -> np.ndarray:
        return sizes if self.weighting is None else np.asarray(self.weighting(sizes), np.float32)

    def _play(self, state: CohortState, round: int, ids: np.ndarray, uplink_bits: np.ndarray | None):
        ids = np.asarray(ids, np.int32)
        examples = self._examples(self.sizes[ids])
        if self.job is None or state.network is None:  # one is there with the other
            participation = Participation(ids, examples, None, np.ones(len(ids), bool), {}, {})
        else:
            network, participation = self._over_network(self.job, state.network, round, ids, examples, uplink_bits)
            state = state._replace(network=network)
        delivered = participation.delivered
        if self.quorum is not None and delivered.sum() < self.quorum(len(ids)):
            participation = participation._replace(delivered=np.zeros_like(delivered))
        return state, participation

    def _over_network(
        self,
        job: NetworkJob,
        state: JobState,
        round: int,
        ids: np.ndarray,
        examples: np.ndarray,
        uplink_bits: np.ndarray | None,
    ) -> tuple[JobState, Participation]:
        network, outcome = network_rounds.play_round(
            job,
            state,
            round=round,
            seed=self.seed,
            client_ids=ids,
            num_examples=examples,
            uplink_bits=uplink_bits,
        )
        weights = network_rounds.cohort_weights(job, outcome, ids, examples)
        extras = {}
        if job.analog:
            extras["snr"] = network_rounds.analog_snr(job, state, round=round, seed=self.seed)[ids]
        record = network_rounds.record(job, network, outcome, ids)
        if uplink_bits is not None:
            record["planned_uplink_bits"] = uplink_bits[ids].tolist()
        return network, Participation(ids, *weights, extras, record, outcome)
