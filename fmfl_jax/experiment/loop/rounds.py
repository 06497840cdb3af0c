"""The round loop of every federation: participation, cohort, round, callbacks, checkpoint, resuming."""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import numpy as np

from fmfl_jax.experiment.config.rounds import RoundsConfig
from fmfl_jax.experiment.loop.checkpointing import open_checkpoints, restore_state, save_state
from fmfl_jax.experiment.loop.client_store import ClientStore
from fmfl_jax.experiment.loop.divergence import (
    all_dropped,
    dropped_line,
    finite_metrics,
    mark_divergence,
    require_some_round,
)
from fmfl_jax.experiment.loop.participation import Participation, Record, Schedule
from fmfl_jax.experiment.loop.records import read_history, write_history
from fmfl_jax.experiment.loop.sharded_store import ShardedStore
from fmfl_jax.fed.core.cohort import put_on_devices, without_padding
from fmfl_jax.fed.core.execution import RoundFn, round_program, stepwise_round
from fmfl_jax.fed.core.round import Round
from fmfl_jax.fed.core.types import Cohort, Params, ServerState, Tree
from fmfl_jax.memory import keep_freed_memory, return_freed_memory
from fmfl_jax.parallel import replicate
from fmfl_jax.progress import Progress
from fmfl_jax.wireless.simulate import RoundOutcome


class Batches(Protocol):
    """The clients' data of a round: (pytree [K, S, ...], local steps of each client int32 [K] or None for S)."""

    def __call__(self, client_ids: np.ndarray, round: int, /) -> tuple[Tree, np.ndarray | None]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What the clients train on. sizes: float32 [num_clients], examples of each. extras: {name: [num_clients, ...]} for
    Cohort.extras. server_batches(round): pytree [S, ...] of the server's data; None where nothing needs them.
    tokens_per_client: of a round, for tokens per second; None where examples are no text."""

    sizes: np.ndarray
    batches: Batches
    extras: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    server_batches: Callable[[int], Tree] | None = None
    tokens_per_client: int | None = None


class RoundView(NamedTuple):
    """What callbacks see of a round. history: the records before it. participation, exports: of the round (None, ()
    where no round was played)."""

    state: ServerState
    frozen: Tree
    store: ClientStore | ShardedStore | None
    history: list[Record]
    participation: Participation | None = None
    exports: Tree = ()

    def client_states(self, ids: np.ndarray) -> Tree:
        """ClientState of arrays [K, ...] of the clients int [K]. Raises ValueError where clients keep nothing."""
        if self.store is None:
            raise ValueError("this algorithm's clients keep nothing between rounds")
        return self.store.gather(ids)


Callback = Callable[[RoundView], Record]
"""Figures for the round's record."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Callbacks:
    """after_round: with the aggregator's exports. at_evaluation: perplexity or accuracy, the clients' personal models,
    the privacy spent. on_evaluation(record): after each of these. say: gets a line for each round that dropped all its
    clients."""

    after_round: tuple[Callback, ...] = ()
    at_evaluation: tuple[Callback, ...] = ()
    on_evaluation: Callable[[Record], None] | None = None
    say: Callable[[str], None] = print


class Work(NamedTuple):
    """What `run_rounds` is given, for `elsewhere` to change. run: the round in place of the compiled one of `parts`."""

    config: RoundsConfig
    parts: Round
    trainable: Params
    frozen: Tree
    source: Source
    schedule: Schedule
    callbacks: Callbacks
    directory: pathlib.Path
    run: RoundFn | None = None


Elsewhere = Callable[[Work], Work]
"""The same rounds with the clients on other machines; see fmfl_jax/deploy."""


class RoundsResult(NamedTuple):
    """state: after the last round. history: one record per round. memory_bytes: what the compiled round needs; None
    where the clients are stepped from Python. outcome: the network's part of the last round, None without a network."""

    state: ServerState
    history: list[Record]
    memory_bytes: int | None
    outcome: RoundOutcome | None = None


class _Compiled(NamedTuple):
    """run: the round. memory_bytes: see RoundsResult. compiles_late: whether its first call compiles."""

    run: RoundFn
    memory_bytes: int | None
    compiles_late: bool


class _Pending(NamedTuple):
    """A round under way, whose figures were not waited for."""

    record: Record
    metrics: dict[str, jax.Array]
    participation: Participation


def run_rounds(
    config: RoundsConfig,
    parts: Round,
    trainable: Params,
    frozen: Tree,
    source: Source,
    schedule: Schedule,
    callbacks: Callbacks,
    *,
    directory: str | pathlib.Path,
    label: str = "rounds",
    elsewhere: Elsewhere | None = None,
) -> RoundsResult:
    """Runs config.num_rounds rounds from `trainable`, or what is left of them after the checkpoint in `directory`.

    Everything random follows from (seed, round, client), so a run that was stopped and continued ends with the same
    bits as one that was not. history is also kept in directory/metrics.jsonl; round 0 is the state before training.
    `round_s` excludes compilation: the time of the rounds since the last that were waited for, divided by their number
    (config.wait_for_rounds waits for each). A round of which nothing is delivered leaves the model as it was and
    records no loss. elsewhere: None for clients in this process.

    Raises ValueError where every round dropped all its clients.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if parts.execution.mesh is None:
        frozen = replicate(frozen, copy=False)
    work = Work(config, parts, trainable, frozen, source, schedule, callbacks, directory)
    if elsewhere is not None:
        work = elsewhere(work)
    config, run = work.config, _Run(work)
    with contextlib.closing(run), open_checkpoints(directory / "checkpoints") as checkpoints:
        run.start(checkpoints)
        done = len(run.history) - 1
        progress = Progress(config.num_rounds, label=label, unit="round", done=done)
        for r in progress.track(range(done, config.num_rounds)):
            run.play(r)
            last = r + 1 == config.num_rounds
            evaluates = last or (r + 1) % config.eval_every == 0
            keeps = last or (r + 1) % config.checkpoint_every == 0
            if evaluates or keeps or r == done or config.wait_for_rounds:
                run.wait()
                if evaluates:
                    run.evaluate()
                record = run.history[-1]
                progress.show(**{name: f"{record[name]:.3f}" for name in ("loss", "ppl", "accuracy") if name in record})
            if keeps:
                run.keep(checkpoints, r + 1)
    require_some_round(run.history)
    return RoundsResult(run.state, run.history, run.compiled.memory_bytes, run.outcome)


class _Run:
    """The state of `run_rounds` between rounds."""

    def __init__(self, work: Work):
        config, parts = self.config, self.parts = work.config, work.parts
        self.frozen, self.source, self.callbacks = work.frozen, work.source, work.callbacks
        self.trainable, self.directory = work.trainable, work.directory
        self.run, self.schedule = work.run, work.schedule
        self.state: ServerState = replicate(parts.init(work.trainable, config.seed), mesh=parts.execution.mesh)
        self.capacity = self.schedule.capacity(config.num_rounds)
        self.history: list[Record] = []
        self.pending: list[_Pending] = []
        self.outcome: RoundOutcome | None = None
        self.store: ClientStore | ShardedStore | None = None
        self.since: float | None = None

    def start(self, checkpoints) -> None:
        """The state before the first round, or as it was kept."""
        self.schedule_state, figures = self.schedule.start()
        restored = restore_state(checkpoints, (self.state, self.schedule_state.selection))
        step = 0
        if restored is not None:
            step, (self.state, selection) = restored
            self.history = read_history(self.directory, up_to_round=step)
            self.schedule_state = self.schedule_state._replace(selection=selection)
            self.schedule_state, last = self.schedule.replay(self.schedule_state, self.history[1:])
            self.outcome = None if last is None else last.outcome
        self.store = open_store(self.parts, self.trainable, len(self.source.sizes), self.directory, step)
        traffic = self.parts.traffic(self.state, np.arange(len(self.source.sizes)), None, self.config.cohort_size)
        self.update_bits, self.message_bits = float(np.mean(traffic.uplink_bits)), float(traffic.downlink_bits)
        if restored is None:
            self.history.append({"round": 0} | figures)
            self.evaluate()
        self.compiled = self._compile()
        self.since = None if self.compiled.compiles_late else time.perf_counter()

    def play(self, r: int) -> None:
        """Round r, from its participation to its clients' states."""
        self.schedule_state, participation = self.schedule.draw(self.schedule_state, r, self._uplink_bits())
        ids = participation.client_ids
        if participation.starting is not None and len(participation.starting):
            self._dispatch(participation.starting)
        cohort = self._put_on_devices(self._cohort(participation, r))
        begin = time.perf_counter()
        self.state, metrics, report = self.compiled.run(self.state, self.frozen, cohort)
        if self.config.wait_for_rounds:
            jax.block_until_ready((self.state, metrics, report))
            seconds = time.perf_counter() - begin  # without the host's work before it
        else:
            seconds = None
        if self.store is not None:
            self.store.scatter(ids, without_padding(report.states, len(ids)))
        if self.schedule.learns:
            losses = without_padding(report.metrics["loss"], len(ids))
            self.schedule_state = self.schedule.observe(self.schedule_state, participation, losses)
        record = {"round": r + 1, "round_s": seconds, "clients": ids.tolist()}
        if self.callbacks.after_round:
            exports = jax.tree.map(lambda x: np.asarray(x[0]), report.exports)  # as one device has them
            record |= self._figures(self.callbacks.after_round, participation=participation, exports=exports)
        self.pending.append(_Pending(record, metrics, participation))
        self.outcome = participation.outcome

    def wait(self) -> None:
        """Ends the rounds under way: their figures join the history."""
        metrics = jax.device_get([pending.metrics for pending in self.pending])
        seconds = None if self.since is None else (time.perf_counter() - self.since) / len(self.pending)
        for pending, figures in zip(self.pending, metrics):
            record = pending.record | finite_metrics(figures)
            record["round_s"] = pending.record["round_s"] if self.config.wait_for_rounds else seconds
            if self.source.tokens_per_client is not None and record["round_s"]:
                record["tokens_per_s"] = len(record["clients"]) * self.source.tokens_per_client / record["round_s"]
            if "uplink_bytes" not in pending.participation.record:
                record |= self._payload(record)
            record |= pending.participation.record
            if all_dropped(record):
                self.callbacks.say(dropped_line(record))
            self.history.append(record)
        self.pending, self.since = [], time.perf_counter()

    def evaluate(self) -> None:
        """Adds the figures of an evaluation to the last record."""
        record = self.history[-1]
        record |= self._figures(self.callbacks.at_evaluation)
        if record["round"]:
            mark_divergence(record, self.history[0])
        if self.callbacks.on_evaluation is not None:
            self.callbacks.on_evaluation(record)

    def keep(self, checkpoints, step: int) -> None:
        """The state on disk, to go on from."""
        write_history(self.directory, self.history)
        if self.store is not None:
            self.store.commit(step)  # first: it can still give the rows of the checkpoint before
        save_state(checkpoints, step, (self.state, self.schedule_state.selection))

    def close(self) -> None:
        """Lets go of the clients' rows, whatever happened."""
        if self.store is not None:
            self.store.close()

    def _figures(self, callbacks: tuple[Callback, ...], **of_round) -> Record:
        view = RoundView(self.state, self.frozen, self.store, self.history, **of_round)
        figures: Record = {}
        for callback in callbacks:
            figures |= callback(view)
        return figures

    def _uplink_bits(self) -> np.ndarray | None:
        """Planned bits of every client's next update, where they follow the clients' states."""
        if not self.parts.algorithm.traffic_follows_states:
            return None
        ids = np.arange(len(self.source.sizes))
        assert self.store is not None  # what the traffic follows
        states = self.store.gather(ids).algorithm
        return np.asarray(self.parts.traffic(self.state, ids, states, self.config.cohort_size).uplink_bits)

    def _dispatch(self, ids: np.ndarray) -> None:
        """Clients that start now keep what the algorithm makes of the server's present message."""
        algorithm = self.parts.algorithm
        assert self.store is not None and algorithm.dispatch is not None  # it is asynchronous
        started = algorithm.dispatch(jax.device_get(algorithm.broadcast(self.state)))
        rows = self.store.gather(ids)
        started = jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], len(ids), axis=0), started)
        self.store.scatter(ids, rows._replace(algorithm=started))

    def _cohort(self, participation: Participation, r: int) -> Cohort:
        """Host arrays [K, ...]."""
        ids = participation.client_ids
        batches, num_steps = self.source.batches(ids, r)
        return Cohort(
            ids,
            participation.weights,
            batches,
            participation.denominators,
            () if self.store is None else self.store.gather(ids),
            participation.delivered,
            num_steps,
            {name: x[ids] for name, x in self.source.extras.items()} | participation.extras,
            None if self.source.server_batches is None else self.source.server_batches(r),
        )

    def _put_on_devices(self, cohort: Cohort) -> Cohort:
        how = self.parts.execution
        return put_on_devices(cohort, clients_per_pass=how.clients_per_pass, capacity=self.capacity, mesh=how.mesh)

    def _compile(self) -> _Compiled:
        if self.run is not None:
            return _Compiled(self.run, None, True)
        if self.parts.execution.stepwise:
            return _Compiled(stepwise_round(self.parts), None, True)
        nobody = np.zeros(0, np.float32)
        extras = {name: np.zeros(0, dtype) for name, dtype in self.schedule.extra_types().items()}
        empty = Participation(nobody.astype(np.int32), nobody, nobody, nobody.astype(bool), extras, {})
        example = self._put_on_devices(self._cohort(empty, 0))
        compiled = round_program(self.parts, self.frozen).lower(self.state, self.frozen, example).compile()
        return_freed_memory()
        keep_freed_memory()
        return _Compiled(compiled, program_memory_bytes(compiled), False)

    def _payload(self, record: Record) -> Record:
        """Bytes sent in a round without a network, all clients together."""
        count = len(record["clients"])
        update, message = record.get("payload_bits", self.update_bits), record.get("download_bits", self.message_bits)
        return {"uplink_bytes": count * update / 8, "downlink_bytes": count * message / 8}


def open_store(
    parts: Round, trainable: Params, num_clients: int, directory: pathlib.Path, step: int
) -> ClientStore | ShardedStore | None:
    """What the clients keep, as it was after round `step`; None where they keep nothing."""
    if not parts.keeps_client_states:
        return None
    init_client = functools.partial(parts.init_client, trainable)
    kind = ClientStore if jax.process_count() == 1 else ShardedStore
    return kind.open(directory / "clients", num_clients, init_client, step=step)


def program_memory_bytes(compiled) -> int:
    """Device memory that a compiled program needs: arguments, outputs and temporaries, shared buffers counted once."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
