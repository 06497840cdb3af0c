"""What a federated job would cost over a network, without training it: from shapes alone, no weights in memory."""

import dataclasses
import pathlib
from typing import NamedTuple

import jax
import matplotlib

matplotlib.use("Agg")  # files only
import matplotlib.pyplot as plt
import numpy as np

from fmfl_jax.config import LlamaConfig
from fmfl_jax.experiment.config.network import NetworkConfig
from fmfl_jax.experiment.methods.codecs import CodecMethod, Identity
from fmfl_jax.experiment.network import rounds as network_rounds
from fmfl_jax.experiment.network.workload import deal_devices, make_job, make_workload
from fmfl_jax.models.params import init_params
from fmfl_jax.models.random_init import random_int4_params
from fmfl_jax.peft.split import FullConfig, PeftConfig, split
from fmfl_jax.transport.size import tree_bits
from fmfl_jax.wireless import compute

WEIGHTS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int4": None}
_PHASES = ("downlink", "compute", "wait", "uplink")
_COLORS = {
    "downlink": "#8fbbe0",
    "compute": "#9ed49e",
    "wait": "#e3e3e3",
    "uplink": "#f7b77a",
    "nothing arrives": "#ea9999",
    "device too small": "#a6a6a6",
}


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
    clients whose update is not delivered; dominates: the phase that the clients that took part spent most seconds in,
    None where nobody did.
    """
    (device,) = deal_devices(network.devices, 1)
    trainable, codec = abstract_trainable(config, params, peft), job.uplink.make()
    work = make_workload(
        config, params, trainable, peft, batch_size=job.batch_size, seq_len=job.seq_len, remat=job.remat
    )
    memory = compute.training_memory_bytes(work)
    sent = tree_bits(trainable) if codec is None else codec.exact_bits(trainable)
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
        "dominates": max(seconds, key=seconds.get) if any(seconds.values()) else None,
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


def duration(seconds: float | None) -> str:
    """For reading: 12 ms, 3.4 s, 5.1 min, 2.3 h."""
    if seconds is None:
        return "-"
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds * 1e3:.3g} ms"


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    cells = [
        [
            "weights",
            "PEFT",
            "network",
            "device",
            "memory, GB of",
            "fits",
            "uplink, MB",
            "round",
            "J per client",
            "outage",
            "dominates",
            "base delivery",
        ]
    ]
    for row in rows:
        energy, outage = row["energy_j_per_client"], row["outage"]
        missed = f", {row['base_unreached']} not reached" if row["base_unreached"] else ""
        base = duration(row["base_delivery_s"]) + missed
        cells.append(
            [
                row["weights"],
                row["peft"],
                row["network"],
                row["device"],
                f"{row['memory_bytes'] / 1e9:.2f} of {row['device_memory_bytes'] / 1e9:.0f}",
                "yes" if row["fits"] else "to answer only" if row["fits_to_answer"] else "no",
                f"{row['uplink_bytes'] / 1e6:.3f}",
                duration(row["round_s"]),
                "-" if energy is None else f"{energy:.4g}",
                "-" if outage is None else f"{outage:.1%}",
                row["dominates"] or "-",
                base,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def regime(row: dict) -> str:
    """What decides: the dominating phase, or why there is no round."""
    if not row["fits"]:
        return "device too small"
    return "nothing arrives" if row["outage"] == 1.0 else row["dominates"]


def plot_regimes(path: pathlib.Path, rows: list[dict], *, title: str) -> None:
    """Device class x PEFT x network, a panel per weight format: colour by what dominates; round time and outage
    inside."""
    forms = list(dict.fromkeys(row["weights"] for row in rows))
    places = list(dict.fromkeys((row["network"], row["device"]) for row in rows))
    pefts = list(dict.fromkeys(row["peft"] for row in rows))
    fig, axes = plt.subplots(
        len(forms),
        1,
        figsize=(3.2 + 1.25 * len(places), 1.6 + len(forms) * (0.9 + 0.5 * len(pefts))),
        squeeze=False,
        layout="constrained",
    )
    for ax, form in zip(axes[:, 0], forms):
        for row in rows:
            if row["weights"] != form:
                continue
            x, y = places.index((row["network"], row["device"])), pefts.index(row["peft"])
            ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=_COLORS[regime(row)], edgecolor="white"))
            text = f"{row['memory_bytes'] / 1e9:.1f} GB" if not row["fits"] else duration(row["round_s"])
            lost = f"\n{row['outage']:.0%} undelivered" if row["outage"] else ""
            ax.text(x, y, text + lost, ha="center", va="center", fontsize=8)
        ax.set(xlim=(-0.5, len(places) - 0.5), ylim=(len(pefts) - 0.5, -0.5), title=f"{form} weights")
        ax.set_xticks(range(len(places)), [f"{device}\n{network}" for network, device in places])
        ax.set_yticks(range(len(pefts)), pefts)
    used = {regime(row) for row in rows}
    fig.legend(
        handles=[plt.Rectangle((0, 0), 1, 1, color=c, label=name) for name, c in _COLORS.items() if name in used],
        loc="outside lower center",
        ncols=3,
        fontsize=8,
    )
    fig.suptitle(title, fontsize=10)
    fig.savefig(path, dpi=150)
    plt.close(fig)
