"""What a federated job would cost over a network, without training it: from shapes alone, no weights in memory."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from fmfl_jax.config import LlamaConfig
from fmfl_jax.experiment.config.network import NetworkConfig
from fmfl_jax.experiment.methods.codecs import CODECS, CodecMethod, Identity
from fmfl_jax.experiment.methods.names import name_of
from fmfl_jax.experiment.network import rounds as network_rounds
from fmfl_jax.experiment.network.workload import deal_devices, make_job, make_workload
from fmfl_jax.models.params import init_params
from fmfl_jax.models.random_init import random_int4_params
from fmfl_jax.peft.split import FullConfig, PeftConfig, check_context, split
from fmfl_jax.transport.size import tree_bits
from fmfl_jax.wireless import compute

WEIGHTS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int4": None}
_PHASES = ("downlink", "compute", "wait", "uplink")


class Job(NamedTuple):
    """A client's work of a round: local_steps of batch_size windows of seq_len tokens; what it sends;
    remat: activations are computed again in the backward pass."""

    local_steps: int
    batch_size: int
    seq_len: int
    uplink: CodecMethod = Identity()
    remat: bool = False


def abstract_params(config: LlamaConfig, weights: str, *, group_size: int = 128) -> dict:
    """The base's parameters in the format `weights` as jax.ShapeDtypeStructs. Raises ValueError for an unknown
    format."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights}: expected some of {', '.join(WEIGHTS)}")
    if weights == "int4":
        make = lambda key: random_int4_params(config, key, group_size=group_size, head=False)
    else:
        make = lambda key: init_params(config, key, dtype=WEIGHTS[weights])
    return jax.eval_shape(make, jax.random.key(0))


def abstract_trainable(config: LlamaConfig, params: dict, peft: PeftConfig) -> dict:
    """What `peft` trains beside params, as jax.ShapeDtypeStructs."""
    return jax.eval_shape(lambda p, key: split(config, p, peft, key=key).trainable, params, jax.random.key(0))


def plan(
    config: LlamaConfig,
    params: dict,
    peft: PeftConfig,
    network: NetworkConfig,
    job: Job,
    *,
    num_clients: int,
    num_rounds: int,
    seed: int = 0,
) -> dict:
    """One row: memory, and of num_rounds simulated rounds with all clients the mean round time, energy and outage.

    network.devices names one class. Where it cannot hold the job the round's figures are None. outage: share of the
    clients whose update is not delivered; dominates: the phase that took the clients that took part most seconds,
    None where nobody did.
    """
    check_context(config, peft, job.seq_len)
    (device,) = deal_devices(network.devices, 1)
    trainable, codec = abstract_trainable(config, params, peft), job.uplink.make()
    work = make_workload(
        config, params, trainable, peft, batch_size=job.batch_size, seq_len=job.seq_len, remat=job.remat
    )
    memory = compute.training_memory_bytes(work)
    sent = tree_bits(trainable) if codec is None else codec.exact_bits(trainable)
    if sent is None:
        uplink = name_of(job.uplink, CODECS)
        raise ValueError(f"uplink={uplink} has no size to plan with: that of its code depends on the values")
    network_job = make_job(
        network,
        config,
        params,
        trainable,
        peft,
        num_clients=num_clients,
        local_steps=job.local_steps,
        batch_size=job.batch_size,
        seq_len=job.seq_len,
        remat=job.remat,
    )
    network_job = dataclasses.replace(network_job, uplink_bits=sent, downlink_bits=tree_bits(trainable))
    row = {
        "network": network.network,
        "device": device.name,
        "memory_bytes": memory,
        "device_memory_bytes": device.memory_bytes,
        "fits": bool(network_job.able[0]),
        "fits_to_answer": compute.inference_memory_bytes(work) <= device.memory_bytes,
        "weight_bytes": tree_bits(params) // 8,
        "uplink_bytes": network_job.uplink_bits / 8,
        "downlink_bytes": network_job.downlink_bits / 8,
    }
    if not row["fits"]:
        return row | dict.fromkeys(
            ("round_s", "energy_j_per_client", "outage", "dominates", "base_delivery_s", "base_unreached")
        )
    return row | _rounds(network_job, num_rounds, seed)


def _rounds(job: network_rounds.NetworkJob, num_rounds: int, seed: int) -> dict:
    """The means of some rounds in which everybody is selected."""
    count = job.network.num_clients
    everybody, examples = np.arange(count), np.ones(count, np.float32)
    state = network_rounds.start(job, seed)
    seconds, round_s, base_s, delivered = dict.fromkeys(_PHASES, 0.0), 0.0, state.base_delivery_s, 0
    for r in range(num_rounds):
        state, outcome = network_rounds.play_round(
            job, state, round=r, seed=seed, client_ids=everybody, num_examples=examples
        )
        delivered += int(outcome.delivered.sum())
        round_s += float(outcome.latency_s)
        base_s += state.base_delivery_s
        for phase in _PHASES:
            seconds[phase] += float(np.sum(getattr(outcome, f"{phase}_s"), dtype=np.float64))
    return {
        "round_s": round_s / num_rounds,
        "energy_j_per_client": state.joules / (num_rounds * count),
        "outage": 1.0 - delivered / (num_rounds * count),
        "dominates": max(seconds, key=lambda phase: seconds[phase]) if any(seconds.values()) else None,
        "base_delivery_s": base_s,
        "base_unreached": network_rounds.totals(job, state)["base_unreached"],
    }


def plan_all(
    config: LlamaConfig,
    pefts: dict[str, PeftConfig],
    weights: list[str],
    networks: list[NetworkConfig],
    job: Job,
    *,
    num_clients: int,
    num_rounds: int,
    group_size: int = 128,
    seed: int = 0,
) -> list[dict]:
    """A row for every combination but full fine-tuning of 4-bit weights, which have no gradient."""
    for peft in pefts.values():
        check_context(config, peft, job.seq_len)
    rows = []
    for form in weights:
        params = abstract_params(config, form, group_size=group_size)
        for name, peft in pefts.items():
            if isinstance(peft, FullConfig) and form == "int4":
                continue
            for network in networks:
                row = plan(
                    config, params, peft, network, job, num_clients=num_clients, num_rounds=num_rounds, seed=seed
                )
                rows.append({"weights": form, "peft": name} | row)
    return rows
