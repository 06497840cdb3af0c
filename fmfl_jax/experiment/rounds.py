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
from fmfl_jax.experiment.checkpointing import open_checkpoints, restore_state, save_state
from fmfl_jax.experiment.evaluate import Evaluation
from fmfl_jax.fed.algorithm import Cohort, FederatedAlgorithm, ServerState
from fmfl_jax.fed.sharding import pmap_round, process_devices, replicate, shard_cohort


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
    """state: after the last round. history: one dict per round. memory_bytes: what the compiled round needs."""

    state: ServerState
    history: list[dict[str, Any]]
    memory_bytes: int


def run_rounds(config: RoundsConfig, algorithm: FederatedAlgorithm, trainable: dict, frozen: dict, data: ClientData,
               evaluate: Callable[[dict, dict], Evaluation], *, directory: str | pathlib.Path,
               label: str = "rounds") -> RoundsResult:
    """Runs config.num_rounds rounds from `trainable`, or what is left of them after the checkpoint in `directory`.

    Everything random follows from (seed, round, client), so a run that was stopped and continued ends with the same
    bits as one that was not. history is also kept in directory/metrics.jsonl; round 0 is the state before training.
    `round_s` excludes compilation.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    frozen = replicate(frozen)
    state = replicate(algorithm.init(trainable, config.seed))
    with open_checkpoints(directory / "checkpoints") as checkpoints:
        start, history = 0, []
        if (restored := restore_state(checkpoints, state)) is not None:
            start, state = restored
            history = read_history(directory, up_to_round=start)
        else:
            history.append({"round": 0} | evaluate(state.params, frozen)._asdict())
        round_fn, memory_bytes = _compile_round(config, algorithm, state, frozen, data)
        bar = tqdm(range(start, config.num_rounds), desc=label, unit="round", initial=start, total=config.num_rounds,
                   disable=None)
        for r in bar:
            batches = round_cohort(config, data, r)
            begin = time.perf_counter()
            state, metrics = jax.block_until_ready(round_fn(state, frozen, batches))
            round_s = time.perf_counter() - begin
            record = {"round": r + 1, "round_s": round_s} | {k: float(v) for k, v in metrics.items()}
            record |= _traffic(config, state.params, data, round_s)
            last = r + 1 == config.num_rounds
            if last or (r + 1) % config.eval_every == 0:
                record |= evaluate(state.params, frozen)._asdict()
            history.append(record)
            bar.set_postfix(loss=f"{record['loss']:.3f}", ppl=f"{record.get('ppl', float('nan')):.2f}")
            if last or (r + 1) % config.checkpoint_every == 0:
                write_history(directory, history)
                save_state(checkpoints, r + 1, state)
    return RoundsResult(state, history, memory_bytes)


def round_cohort(config: RoundsConfig, data: ClientData, r: int) -> Cohort:
    """The cohort of round r, laid out over this process's devices: leaves [devices, C, ...]."""
    client_ids = cohort(len(data.client_indices), config.cohort_size, round=r, seed=config.seed)
    batches = client_batches(data.windows, data.client_indices, client_ids=client_ids, round=r,
                             local_steps=config.local_steps, batch_size=config.batch_size, seed=config.seed)
    whole = Cohort(client_ids.astype(np.int32), batches.num_examples.astype(np.float32), batches.tokens)
    laid_out = shard_cohort(whole, num_devices=jax.device_count(), clients_per_pass=config.clients_per_pass)
    return jax.tree.map(lambda x: x[process_devices()], laid_out)


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


def _compile_round(config: RoundsConfig, algorithm: FederatedAlgorithm, state, frozen, data: ClientData):
    compiled = pmap_round(algorithm).lower(state, frozen, round_cohort(config, data, 0)).compile()
    return compiled, program_memory_bytes(compiled)


def _traffic(config: RoundsConfig, params: dict, data: ClientData, round_s: float) -> dict:
    """Bytes sent in a round, all clients together, and the tokens trained per second."""
    payload = config.cohort_size * sum(x.nbytes for x in jax.tree.leaves(params))
    tokens = config.cohort_size * config.local_steps * config.batch_size * (data.windows.shape[1] - 1)
    return {"uplink_bytes": payload, "downlink_bytes": payload, "tokens_per_s": tokens / round_s}
