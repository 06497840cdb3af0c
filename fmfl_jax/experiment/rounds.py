"""The round loop: cohorts, batches, rounds, metrics, evaluation, checkpoints, and going on after a stop."""

import dataclasses
import json
import pathlib
import time
from typing import Any, Callable, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from fmfl_jax.data.batches import client_batches, cohort
from fmfl_jax.experiment import air as over_air
from fmfl_jax.experiment.air import Air
from fmfl_jax.experiment.checkpointing import open_checkpoints, restore_state, save_state
from fmfl_jax.experiment.evaluate import Evaluation
from fmfl_jax.fed.algorithm import Cohort, FederatedAlgorithm, ServerState
from fmfl_jax.fed.sharding import pmap_round, replicate, shard_cohort, spread
from fmfl_jax.fed.uplink import tree_bits
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


class RoundsResult(NamedTuple):
    """state: after the last round. history: one dict per round. memory_bytes: what the compiled round needs. outcome: the
    network's part of the last round, None without a network."""

    state: ServerState
    history: list[dict[str, Any]]
    memory_bytes: int
    outcome: RoundOutcome | None = None


def run_rounds(config: RoundsConfig, algorithm: FederatedAlgorithm, trainable: dict, frozen: dict, data: ClientData,
               evaluate: Callable[[dict, dict], Evaluation], *, directory: str | pathlib.Path,
               label: str = "rounds", air: Air | None = None, uplink_bits: int | None = None,
               on_evaluation: Callable[[dict], None] | None = None) -> RoundsResult:
    """Runs config.num_rounds rounds from `trainable`, or what is left of them after the checkpoint in `directory`.

    Everything random follows from (seed, round, client), so a run that was stopped and continued ends with the same
    bits as one that was not. history is also kept in directory/metrics.jsonl; round 0 is the state before training.
    `round_s` excludes compilation. A round that nobody is heard in leaves the model as it was and records no loss.

    Args:
      air: the network that the rounds go over; None: everybody is heard and nothing is counted but bytes.
      uplink_bits: of one client's update where the algorithm's uplink changes it; None: the parameters' own.
      on_evaluation: called with the record of each evaluated round.
    """
    if air is not None and air.network.num_clients != len(data.client_indices):
        raise ValueError(f"the network has {air.network.num_clients} clients, the data {len(data.client_indices)}")
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tell = on_evaluation or (lambda record: None)
    frozen = replicate(frozen, copy=False)
    state, kept = replicate(algorithm.init(trainable, config.seed)), _client_states(algorithm, trainable, data)
    with open_checkpoints(directory / "checkpoints") as checkpoints:
        start, history = 0, []
        if (restored := restore_state(checkpoints, _checkpoint(state, kept))) is not None:
            start, saved = restored
            state, kept = saved if jax.tree.leaves(kept) else (saved, kept)
            kept = jax.tree.map(np.array, kept)  # what was restored may be read-only
            history = read_history(directory, up_to_round=start)
        network, outcome = (None, None) if air is None else _replay(config, air, data, start)
        if restored is None:
            spent = {} if air is None else over_air.start_record(network)
            history.append({"round": 0} | evaluate(state.params, frozen)._asdict() | spent)
            tell(history[0])
        round_fn, memory_bytes = _compile_round(config, algorithm, state, frozen, data, kept)
        bar = tqdm(range(start, config.num_rounds), desc=label, unit="round", initial=start, total=config.num_rounds,
                   disable=None)
        for r in bar:
            whole = host_cohort(config, data, r)
            if air is not None:
                network, outcome, whole = _over_air(config, air, network, r, whole)
            ids = whole.client_ids
            laid_out = lay_out(config, whole._replace(client_states=jax.tree.map(lambda x: x[ids], kept)))
            begin = time.perf_counter()
            state, metrics, *new = jax.block_until_ready(round_fn(state, frozen, laid_out))
            round_s = time.perf_counter() - begin
            for old, now in zip(jax.tree.leaves(kept), jax.tree.leaves(new)):
                old[ids] = np.asarray(now).reshape(now.shape[0] * now.shape[1], *old.shape[1:])[: len(ids)]
            record = {"round": r + 1, "round_s": round_s} | {k: float(v) for k, v in metrics.items()}
            record |= _traffic(config, state.params, data, round_s, uplink_bits)
            if air is not None:
                record |= over_air.record(air, network, outcome, ids)
                if not np.any(whole.weights):
                    del record["loss"]  # the mean over nobody
            last = r + 1 == config.num_rounds
            if last or (r + 1) % config.eval_every == 0:
                record |= evaluate(state.params, frozen)._asdict()
                tell(record)
            history.append(record)
            bar.set_postfix(loss=f"{record.get('loss', float('nan')):.3f}", ppl=f"{record.get('ppl', float('nan')):.2f}")
            if last or (r + 1) % config.checkpoint_every == 0:
                write_history(directory, history)
                save_state(checkpoints, r + 1, _checkpoint(state, kept))
    return RoundsResult(state, history, memory_bytes, outcome)


def host_cohort(config: RoundsConfig, data: ClientData, r: int) -> Cohort:
    """The cohort of round r with everybody heard; numpy leaves [C, ...]."""
    client_ids = cohort(len(data.client_indices), config.cohort_size, round=r, seed=config.seed)
    batches = client_batches(data.windows, data.client_indices, client_ids=client_ids, round=r,
                             local_steps=config.local_steps, batch_size=config.batch_size, seed=config.seed)
    return Cohort(client_ids.astype(np.int32), batches.num_examples.astype(np.float32), batches.tokens)


def lay_out(config: RoundsConfig, whole: Cohort) -> Cohort:
    """A cohort over all devices: leaves [devices, C, ...]."""
    return spread(shard_cohort(whole, num_devices=jax.device_count(), clients_per_pass=config.clients_per_pass))


def program_memory_bytes(compiled) -> int:
    """Device memory that a compiled program needs: arguments, outputs and temporaries, shared buffers counted once."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes


def read_history(directory: pathlib.Path, *, up_to_round: int) -> list[dict]:
    """The rounds of directory/metrics.jsonl that the checkpoint of up_to_round knows."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["round"] <= up_to_round]


def write_history(directory: pathlib.Path, history: list[dict]) -> None:
    """Replaces directory/metrics.jsonl in one step; of several processes the first writes."""
    if jax.process_index() == 0:
        text = "".join(json.dumps(record) + "\n" for record in history)
        temporary = directory / "metrics.jsonl.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(directory / "metrics.jsonl")


def _client_states(algorithm: FederatedAlgorithm, trainable: dict, data: ClientData):
    """What all clients keep between rounds, on the host: numpy leaves [num_clients, ...]."""
    if algorithm.init_client is None:
        return ()
    one = algorithm.init_client(trainable)
    kept = jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], len(data.client_indices), axis=0), one)
    if jax.process_count() > 1:
        raise ValueError("an uplink transform keeps its clients' states on one host: --uplink needs a single process")
    return kept


def _checkpoint(state: ServerState, kept):
    return (state, kept) if jax.tree.leaves(kept) else state


def _over_air(config: RoundsConfig, air: Air, network, r: int, whole: Cohort):
    """Round r's part on the network: (its state, outcome, the cohort with the weights of those who are heard)."""
    ids, examples = whole.client_ids, whole.weights
    network, outcome = over_air.play_round(air, network, round=r, seed=config.seed, client_ids=ids,
                                           num_examples=examples)
    weights, normalizers = over_air.cohort_weights(air, outcome, ids, examples)
    return network, outcome, whole._replace(weights=weights, normalizers=normalizers)


def _replay(config: RoundsConfig, air: Air, data: ClientData, num_rounds: int):
    """(network state, last outcome) after num_rounds rounds: cheap beside training, and exact."""
    network, outcome = over_air.start(air, config.seed), None
    sizes = np.asarray([len(indices) for indices in data.client_indices], np.float32)
    for r in range(num_rounds):
        ids = cohort(len(sizes), config.cohort_size, round=r, seed=config.seed)
        network, outcome = over_air.play_round(air, network, round=r, seed=config.seed, client_ids=ids,
                                               num_examples=sizes[ids])
    return network, outcome


def _compile_round(config: RoundsConfig, algorithm: FederatedAlgorithm, state, frozen, data: ClientData, kept):
    example = host_cohort(config, data, 0)
    ids = example.client_ids
    example = example._replace(client_states=jax.tree.map(lambda x: x[ids], kept))
    compiled = pmap_round(algorithm).lower(state, frozen, lay_out(config, example)).compile()
    return compiled, program_memory_bytes(compiled)


def _traffic(config: RoundsConfig, params: dict, data: ClientData, round_s: float, uplink_bits: int | None) -> dict:
    """Bytes sent in a round, all clients together, and the tokens trained per second."""
    bits = tree_bits(params)
    tokens = config.cohort_size * config.local_steps * config.batch_size * (data.windows.shape[1] - 1)
    return {"uplink_bytes": config.cohort_size * (bits if uplink_bits is None else uplink_bits) / 8,
            "downlink_bytes": config.cohort_size * bits / 8, "tokens_per_s": tokens / round_s}
