"""What a federated job would cost over a network, without training it: from shapes alone, no weights in memory."""

import pathlib
from typing import NamedTuple

import jax
import matplotlib

matplotlib.use("Agg")  # files only
import matplotlib.pyplot as plt
import numpy as np

from fmfl_jax.config import LlamaConfig
from fmfl_jax.experiment import air as over_air
from fmfl_jax.experiment.config import AirConfig, make_uplink
from fmfl_jax.experiment.workload import deal_devices, make_air, make_workload
from fmfl_jax.fed.uplink import tree_bits
from fmfl_jax.models.params import init_params
from fmfl_jax.models.random_init import random_int4_params
from fmfl_jax.peft.split import FullConfig, PeftConfig, check_context, split
from fmfl_jax.wireless import compute

WEIGHTS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int4": None}
_PHASES = ("downlink", "compute", "wait", "uplink")
_COLORS = {
    "downlink": "#8fbbe0",
    "compute": "#9ed49e",
    "wait": "#e3e3e3",
    "uplink": "#f7b77a",
    "nobody is heard": "#ea9999",
    "device too small": "#a6a6a6",
}


class Job(NamedTuple):
    """A client's work of a round: local_steps of batch_size windows of seq_len tokens; what it sends (see make_uplink);
    remat: activations are computed again in the backward pass."""

    local_steps: int
    batch_size: int
    seq_len: int
    uplink: str | None = None
    remat: bool = False


def abstract_params(config: LlamaConfig, weights: str, *, group_size: int = 128) -> dict:
    """The base's parameters in the format `weights` as jax.ShapeDtypeStructs. Raises ValueError for an unknown
    format."""
    if weights not in WEIGHTS:
        raise ValueError(f"--weights={weights}: expected some of {', '.join(WEIGHTS)}")
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
    air_config: AirConfig,
    job: Job,
    *,
    num_clients: int,
    num_rounds: int,
    seed: int = 0,
) -> dict:
    """One row: memory, and of num_rounds simulated rounds with all clients the mean round time, energy and outage.

    air_config.devices names one class. Where it cannot hold the job the round's figures are None. outage: share of the
    clients that are not heard; dominates: the phase that the clients that took part spent most seconds in, None where
    nobody did.
    """
    check_context(config, peft, job.seq_len)
    (device,) = deal_devices(air_config.devices, 1)
    trainable, uplink = abstract_trainable(config, params, peft), make_uplink(job.uplink)
    work = make_workload(
        config, params, trainable, peft, batch_size=job.batch_size, seq_len=job.seq_len, remat=job.remat
    )
    memory = compute.training_memory_bytes(work)
    air = make_air(
        air_config,
        config,
        params,
        trainable,
        peft,
        num_clients=num_clients,
        local_steps=job.local_steps,
        batch_size=job.batch_size,
        seq_len=job.seq_len,
        downlink_bits=tree_bits(trainable),
        uplink_bits=tree_bits(trainable) if uplink is None else uplink.exact_bits(trainable),
        remat=job.remat,
    )
    row = {
        "network": air_config.network,
        "device": device.name,
        "memory_bytes": memory,
        "device_memory_bytes": device.memory_bytes,
        "fits": bool(air.able[0]),
        "fits_to_answer": compute.inference_memory_bytes(work) <= device.memory_bytes,
        "weight_bytes": tree_bits(params) // 8,
        "uplink_bytes": air.uplink_bits / 8,
        "downlink_bytes": air.downlink_bits / 8,
    }
    if not row["fits"]:
        return row | dict.fromkeys(
            ("round_s", "energy_j_per_client", "outage", "dominates", "base_delivery_s", "base_unreached")
        )
    return row | _rounds(air, num_rounds, seed)


def _rounds(air: over_air.Air, num_rounds: int, seed: int) -> dict:
    """The means of some rounds in which everybody is selected."""
    count = air.network.num_clients
    everybody, examples = np.arange(count), np.ones(count, np.float32)
    state = over_air.start(air, seed)
    seconds, round_s, base_s, heard = dict.fromkeys(_PHASES, 0.0), 0.0, state.base_delivery_s, 0
    for r in range(num_rounds):
        state, outcome = over_air.play_round(
            air, state, round=r, seed=seed, client_ids=everybody, num_examples=examples
        )
        heard += int(outcome.delivered.sum())
        round_s += float(outcome.latency_s)
        base_s += state.base_delivery_s
        for phase in _PHASES:
            seconds[phase] += float(np.sum(getattr(outcome, f"{phase}_s"), dtype=np.float64))
    return {
        "round_s": round_s / num_rounds,
        "energy_j_per_client": state.joules / (num_rounds * count),
        "outage": 1.0 - heard / (num_rounds * count),
        "dominates": max(seconds, key=seconds.get) if any(seconds.values()) else None,
        "base_delivery_s": base_s,
        "base_unreached": over_air.spent(air, state)["base_unreached"],
    }


def plan_all(
    config: LlamaConfig,
    pefts: dict[str, PeftConfig],
    weights: list[str],
    airs: list[AirConfig],
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
            for air in airs:
                row = plan(config, params, peft, air, job, num_clients=num_clients, num_rounds=num_rounds, seed=seed)
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
    return "nobody is heard" if row["outage"] == 1.0 else row["dominates"]


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
            lost = f"\n{row['outage']:.0%} unheard" if row["outage"] else ""
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
