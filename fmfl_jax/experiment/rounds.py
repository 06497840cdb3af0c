"""The round loop: cohorts, batches, rounds, metrics, evaluation, checkpoints, and going on after a stop."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from fmfl_jax.data.batches import client_batches
from fmfl_jax.experiment.air import Air
from fmfl_jax.experiment.async_schedule import BufferedTurns
from fmfl_jax.experiment.checkpointing import open_checkpoints, restore_state, save_state
from fmfl_jax.experiment.client_store import ClientStore
from fmfl_jax.experiment.evaluate import Evaluation
from fmfl_jax.experiment.records import read_history, write_history
from fmfl_jax.experiment.turns import Turn, Turns
from fmfl_jax.fed.algorithm import ClientReport, Cohort, FederatedAlgorithm, ServerState
from fmfl_jax.fed.fed_buff import started
from fmfl_jax.fed.selection import Selector, uniform
from fmfl_jax.fed.sharding import pmap_round, replicate, shard_cohort, spread
from fmfl_jax.fed.uplink import tree_bits
from fmfl_jax.progress import Progress
from fmfl_jax.wireless.simulate import RoundOutcome


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """A federated run. cohort_size clients are drawn in each round; each takes local_steps of batch_size windows.

    eval_every, checkpoint_every: in rounds; the last round is always evaluated and kept. clients_per_pass: how many
    clients of a device train side by side; None is all.
    """

    num_rounds: int
    cohort_size: int
    local_steps: int
    batch_size: int
    seed: int = 0
    clients_per_pass: int | None = None
    eval_every: int = 1
    checkpoint_every: int = 5

    def __post_init__(self):
        for name in ("num_rounds", "cohort_size", "local_steps", "batch_size", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.clients_per_pass is not None and self.clients_per_pass < 1:
            raise ValueError(f"clients_per_pass must be at least 1, got {self.clients_per_pass}")


class ClientData(NamedTuple):
    """windows: int32 [W, T+1]. client_indices: for each client, the numbers of its windows."""

    windows: np.ndarray
    client_indices: list[np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run has beyond plain rounds; the defaults are uniform cohorts that everybody of is heard.

    selector: who takes part; None: cohort_size clients uniformly. weigh: a client's weight by its number of examples;
    None: the aggregator's default. air: the network that the rounds go over.
    batches(client_ids [K], round) -> pytree [K, S, ...]; None: local_steps x batch_size of each client's windows.
    root(round) -> batches [S, ...] of the server's own data. extras: {name: [num_clients, ...]} for Cohort.extras.
    on_exports(exports [K, ...], turn, round) -> figures: what the host does with what the aggregator exports.
    turns: who takes part, where it is not by selector and air (asynchronous runs).
    quorum(cohort size) -> how many must be heard; with fewer the round is void. spent(cohorts so far) -> figures of the
    privacy spent. evaluate_clients(params, frozen, store or None) -> figures of the clients' own models.
    uplink_bits: of one client's message, where it is neither the algorithm's own nor told by the clients.
    """

    selector: Selector | None = None
    weigh: Callable | None = None
    air: Air | None = None
    batches: Callable | None = None
    root: Callable | None = None
    extras: dict = dataclasses.field(default_factory=dict)
    on_exports: Callable | None = None
    turns: BufferedTurns | None = None
    quorum: Callable | None = None
    spent: Callable | None = None
    evaluate_clients: Callable | None = None
    uplink_bits: int | None = None


class RoundsResult(NamedTuple):
    """state: after the last round. history: one dict per round. memory_bytes: what the compiled round needs. outcome:
    the network's part of the last round, None without a network."""

    state: ServerState
    history: list[dict[str, Any]]
    memory_bytes: int
    outcome: RoundOutcome | None = None


def run_rounds(
    config: RoundsConfig,
    algorithm: FederatedAlgorithm,
    trainable: dict,
    frozen: dict,
    data: ClientData,
    evaluate: Callable[[dict, dict], Evaluation],
    *,
    directory: str | pathlib.Path,
    label: str = "rounds",
    parts: Parts = Parts(),
    on_evaluation: Callable[[dict], None] | None = None,
) -> RoundsResult:
    """Runs config.num_rounds rounds from `trainable`, or what is left of them after the checkpoint in `directory`.

    Everything random follows from (seed, round, client), so a run that was stopped and continued ends with the same
    bits as one that was not. history is also kept in directory/metrics.jsonl; round 0 is the state before training.
    `round_s` excludes compilation. A round that nobody is heard in leaves the model as it was and records no loss.

    Args:
      on_evaluation: called with the record of each evaluated round.
    """
    air = parts.air
    if air is not None and air.network.num_clients != len(data.client_indices):
        raise ValueError(f"the network has {air.network.num_clients} clients, the data {len(data.client_indices)}")
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tell = on_evaluation or (lambda record: None)
    turns = make_turns(config, data, parts)
    frozen = replicate(frozen, copy=False)
    state = replicate(algorithm.init(trainable, config.seed))
    turns_state, delivery = turns.start()

    def evaluated(cohorts: list) -> dict:
        found = evaluate(algorithm.shared(state.params), frozen)._asdict()
        if parts.evaluate_clients is not None:
            found |= parts.evaluate_clients(state.params, frozen, store)
        return found if parts.spent is None else found | parts.spent(cohorts)

    with open_checkpoints(directory / "checkpoints") as checkpoints:
        start, history, turn = 0, [], None
        if (restored := restore_state(checkpoints, (state, turns_state.selection))) is not None:
            start, (state, selection) = restored
            history = read_history(directory, up_to_round=start)
            turns_state = turns_state._replace(selection=selection)
            turns_state, turn = turns.replay(turns_state, [record["clients"] for record in history[1:]])
        store = open_store(algorithm, trainable, len(data.client_indices), directory, start)
        if restored is None:
            history.append({"round": 0} | evaluated([]) | delivery)
            tell(history[0])
        round_fn, memory_bytes = _compile_round(config, algorithm, state, frozen, data, parts, turns, store)
        progress = Progress(config.num_rounds, label=label, unit="round", done=start)
        for r in progress.track(range(start, config.num_rounds)):
            turns_state, turn = turns.turn(turns_state, r)
            if parts.quorum is not None and turn.heard.sum() < parts.quorum(len(turn.client_ids)):
                turn = turn._replace(heard=np.zeros_like(turn.heard))
            ids = turn.client_ids
            if turn.starting is not None and len(turn.starting):
                store.scatter(turn.starting, started(store.gather(turn.starting), jax.device_get(state.params)))
            laid_out = lay_out(config, make_cohort(config, data, parts, turns, turn, store, r))
            begin = time.perf_counter()
            state, metrics, report = jax.block_until_ready(round_fn(state, frozen, laid_out))
            round_s = time.perf_counter() - begin
            report = _of_clients(report, len(ids))
            if store is not None:
                store.scatter(ids, report.states)
            turns_state = turns.observe(turns_state, turn, report.scalars["loss"])
            record = {"round": r + 1, "round_s": round_s} | {k: float(v) for k, v in metrics.items()}
            record |= {"clients": ids.tolist(), "tokens_per_s": _tokens(config, data, len(ids)) / round_s}
            record |= _traffic(algorithm, parts, state, record, turn) | turn.record
            if parts.on_exports is not None:
                record |= parts.on_exports(report.exports, turn, r)
            if not np.any(turn.heard):
                del record["loss"]  # the mean over nobody
            last = r + 1 == config.num_rounds
            if last or (r + 1) % config.eval_every == 0:
                record |= evaluated([before["clients"] for before in history[1:]] + [record["clients"]])
                tell(record)
            history.append(record)
            progress.show(loss=f"{record.get('loss', float('nan')):.3f}", ppl=f"{record.get('ppl', float('nan')):.2f}")
            if last or (r + 1) % config.checkpoint_every == 0:
                write_history(directory, history)
                save_state(checkpoints, r + 1, (state, turns_state.selection))
                if store is not None:
                    store.commit(r + 1)
    return RoundsResult(state, history, memory_bytes, None if turn is None else turn.outcome)


def make_turns(config: RoundsConfig, data: ClientData, parts: Parts) -> Turns | BufferedTurns:
    """Who takes part in which round."""
    if parts.turns is not None:
        return parts.turns
    selector = uniform(config.cohort_size) if parts.selector is None else parts.selector
    sizes = np.asarray([len(indices) for indices in data.client_indices], np.float32)
    return Turns(selector=selector, sizes=sizes, seed=config.seed, air=parts.air, weigh=parts.weigh)


def make_cohort(
    config: RoundsConfig, data: ClientData, parts: Parts, turns: Turns, turn: Turn, store, r: int
) -> Cohort:
    """The cohort of a turn, numpy leaves [capacity, ...]: filled up with clients of weight 0 to the size that all
    rounds share, so that the round compiles once."""
    missing = turns.capacity(config.num_rounds) - len(turn.client_ids)
    ids = np.concatenate([turn.client_ids, np.zeros(missing, np.int32)])

    def filled(x):
        return np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])

    batches = (parts.batches or plain_batches(config, data))(ids, r)
    extras = {name: x[ids] for name, x in parts.extras.items()}
    return Cohort(
        ids,
        filled(turn.weights),
        batches,
        None if turn.normalizers is None else filled(turn.normalizers),
        () if store is None else store.gather(ids),
        filled(turn.heard),
        extras | jax.tree.map(filled, turn.extras),
        None if parts.root is None else parts.root(r),
    )


def plain_batches(config: RoundsConfig, data: ClientData) -> Callable:
    """batches(client_ids, round): local_steps x batch_size of each client's windows, int32 [K, S, B, T+1]."""

    def batches(client_ids, r):
        return client_batches(
            data.windows,
            data.client_indices,
            client_ids=client_ids,
            round=r,
            seed=config.seed,
            local_steps=config.local_steps,
            batch_size=config.batch_size,
        ).tokens

    return batches


def lay_out(config: RoundsConfig, whole: Cohort) -> Cohort:
    """A cohort over all devices: leaves [devices, C, ...]."""
    return spread(shard_cohort(whole, num_devices=jax.device_count(), clients_per_pass=config.clients_per_pass))


def program_memory_bytes(compiled) -> int:
    """Device memory that a compiled program needs: arguments, outputs and temporaries, shared buffers counted once."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes


def open_store(
    algorithm: FederatedAlgorithm, trainable: dict, num_clients: int, directory: pathlib.Path, step: int
) -> ClientStore | None:
    """What the clients keep, as it was after round `step`; None where they keep nothing."""
    if algorithm.init_client is None:
        return None
    if jax.process_count() > 1:
        raise ValueError("what clients keep between rounds lies on one host: this needs a single process")
    return ClientStore.open(
        directory / "clients", num_clients, functools.partial(algorithm.init_client, trainable), step=step
    )


def _of_clients(report: ClientReport, count: int) -> ClientReport:
    """[devices, C, ...] -> [count, ...] without the padding, on the host; exports as one device has them, padding
    included. With several processes only the scalars."""
    if jax.process_count() > 1:
        gathered = multihost_utils.process_allgather(report.scalars, tiled=True)
        report = ClientReport((), gathered)
    exports = jax.tree.map(lambda x: np.asarray(x[0]), report.exports)
    flat = lambda x: np.asarray(x).reshape(-1, *x.shape[2:])[:count]
    return jax.tree.map(flat, report._replace(exports=()))._replace(exports=exports)


def _compile_round(
    config: RoundsConfig,
    algorithm: FederatedAlgorithm,
    state,
    frozen,
    data: ClientData,
    parts: Parts,
    turns: Turns,
    store,
):
    nobody = np.zeros(0, np.float32)
    extras = {}
    if parts.air is not None:  # a turn of the right structure
        _, turn = turns.turn(turns.start()[0], 0)
        extras = jax.tree.map(lambda x: x[:0], turn.extras)
    turn = Turn(nobody.astype(np.int32), nobody, nobody, nobody.astype(bool), extras, {})
    example = make_cohort(config, data, parts, turns, turn, store, 0)
    compiled = pmap_round(algorithm).lower(state, frozen, lay_out(config, example)).compile()
    return compiled, program_memory_bytes(compiled)


def _tokens(config: RoundsConfig, data: ClientData, num_clients: int) -> int:
    return num_clients * config.local_steps * config.batch_size * (data.windows.shape[1] - 1)


def _traffic(algorithm: FederatedAlgorithm, parts: Parts, state: ServerState, record: dict, turn: Turn) -> dict:
    """Bytes sent in a round, all clients together; a network counts its own."""
    own = parts.uplink_bits or tree_bits(algorithm.message_like(state.params))
    message = record.get("payload_bits", float(own))
    download = record.get("download_bits", float(tree_bits(algorithm.download(state.params, state.extra))))
    return {"uplink_bytes": len(turn.client_ids) * message / 8, "downlink_bytes": len(turn.client_ids) * download / 8}
