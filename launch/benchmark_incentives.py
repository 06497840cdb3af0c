"""Incentives side by side: what clients are paid, who takes part and how good the model gets, at the same budget.

  python -m launch.benchmark_incentives --out=runs/incentives

Small models over a network, clients of unequal numbers of rows on devices of unequal power (launch.cross_device's
linear task). A budget is a share of what a cohort of average clients spends in a round, by the joules of a first run in
which all work for nothing (`uniform`). posted is random selection at the same budget: one price for whoever accepts.
Every mechanism runs at every budget with every seed, which makes data, network and draws. A run that is done
is not done again. Writes table.md and rows.json.
"""

import json
import pathlib

import numpy as np
from absl import flags

from fmfl_jax.experiment.build.classification import make_task
from fmfl_jax.experiment.config.cross_device import CrossDeviceConfig, TaskConfig
from fmfl_jax.experiment.config.federation import FederationConfig
from fmfl_jax.experiment.config.network import NetworkConfig
from fmfl_jax.experiment.cross_device import run_cross_device
from fmfl_jax.experiment.loop.market import J_PER_KWH
from fmfl_jax.experiment.loop.records import claim, settings_of, write_json
from fmfl_jax.experiment.loop.run_lock import run_lock
from fmfl_jax.experiment.methods.incentives import INCENTIVES
from launch import app

_NETWORK = flags.DEFINE_string("network", "umi_20", "Preset of the network.")
_DEVICES = flags.DEFINE_list("device", ["phone", "vehicle", "edge_box"], "Devices, dealt in turn.")
_CLIENTS = flags.DEFINE_integer("num_clients", 60, "Clients.", lower_bound=2)
_COHORT = flags.DEFINE_integer("cohort_size", 15, "The most clients of a round.", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("num_rounds", 60, "Rounds of a run.", lower_bound=1)
_SHARES = flags.DEFINE_list("budgets", ["0.1", "0.3", "1"], "Budgets, as shares of an average cohort's cost.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Runs of each, with seeds 0, 1, ...", lower_bound=1)
_MECHANISMS = flags.DEFINE_list("incentives", list(INCENTIVES), "Mechanisms.")
_OUT = flags.DEFINE_string("out", "runs/incentives", "Folder of the table and of the runs.")


def settings(seed: int, federation: FederationConfig) -> CrossDeviceConfig:
    """One run."""
    return CrossDeviceConfig(
        num_rounds=_ROUNDS.value,
        cohort_size=_COHORT.value,
        federation=federation,
        network=NetworkConfig(network=_NETWORK.value, devices=tuple(_DEVICES.value)),
        seed=seed,
        eval_every=max(1, _ROUNDS.value // 10),
        checkpoint_every=_ROUNDS.value,
    )


def measured(name: str, seed: int, federation: FederationConfig) -> dict:
    """The figures of one run, from its folder where it is done; without "accuracy" where the budget buys nobody."""
    folder, config = pathlib.Path(_OUT.value) / name / str(seed), settings(seed, federation)
    if (folder / "figures.json").exists():
        claim(folder, settings_of(config))
        return json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    claim(folder, settings_of(config))
    task = make_task(TaskConfig(num_clients=_CLIENTS.value, seed=seed))
    try:
        history = run_cross_device(config, *task, folder, label=f"{name}, seed {seed}").history
    except ValueError as error:
        if "takes on nobody" not in str(error):
            raise
        figures = {"nobody": str(error)}
    else:
        figures = figures_of(history)
    write_json(folder / "figures.json", figures)
    return figures


def figures_of(history: list[dict]) -> dict:
    """Means over the rounds, and the model at the end: the mean accuracy of the last three looks."""
    rounds, looks = history[1:], [record["accuracy"] for record in history if "accuracy" in record]
    ids = np.concatenate([record["clients"] for record in rounds])
    mean = lambda name: float(np.mean([record.get(name, 0.0) for record in rounds]))
    return {
        "accuracy": float(np.mean(looks[-3:])),
        "paid_usd": mean("paid_usd"),
        "cost_usd": mean("cost_usd"),
        "surplus_usd": mean("client_surplus_usd"),
        "least_surplus_usd": min(record.get("least_surplus_usd", 0.0) for record in rounds),
        "most_paid_usd": max(record.get("paid_usd", 0.0) for record in rounds),
        "clients": len(ids) / len(rounds),
        "delivered": mean("delivered"),
        "ever": len(np.unique(ids)),
        "energy_j": mean("energy_j"),
    }


def compare() -> list[dict]:
    """A row for each mechanism, budget and seed; of `uniform`, where clients work for nothing, one for each seed."""
    rows = []
    for seed in range(_SEEDS.value):
        free = measured("uniform", seed, FederationConfig())
        price = FederationConfig().energy_usd_per_kwh / J_PER_KWH
        cohort_usd = price * free["energy_j"] / free["clients"] * _COHORT.value
        rows.append({"incentive": "uniform", "share": None, "seed": seed, "budget_usd": None} | free)
        for share in map(float, _SHARES.value):
            for name in _MECHANISMS.value:
                method = INCENTIVES[name](budget_usd=share * cohort_usd)
                figures = measured(f"{name}-{share:g}", seed, FederationConfig(incentive=method))
                rows.append(
                    {"incentive": name, "share": share, "seed": seed, "budget_usd": share * cohort_usd} | figures
                )
                app.say(f"seed {seed}, budget {share:g}, {name}: {figures}")
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: mean +- standard deviation over the seeds; above uniform's: by the run of the same seed."""
    free = {row["seed"]: row["accuracy"] for row in rows if row["share"] is None}
    lines = [
        "| budget | incentive | accuracy | above uniform's | clients a round | delivered | clients ever | "
        "spent of the budget | highest round | kept by clients, of what is paid | "
        "least kept by a client, of the budget | J a round |",
        "|---" * 12 + "|",
    ]
    keys = list(dict.fromkeys((row["share"], row["incentive"]) for row in rows))
    for share, name in sorted(keys, key=lambda key: (key[0] is not None, key[0] or 0)):
        chosen = [row for row in rows if (row["share"], row["incentive"]) == (share, name) and "accuracy" in row]
        if not chosen:
            lines.append(f"| {share:g} | {name} | nobody is taken on" + " |" * 10)
            continue
        of = lambda what: np.asarray([what(row) for row in chosen])
        spread = lambda values, how: f"{values.mean():{how}} ± {values.std():{how.lstrip('+')}}"
        money = ["-"] * 4
        if share is not None:
            money = [
                spread(of(lambda row: row["paid_usd"] / row["budget_usd"]), ".2f"),
                spread(of(lambda row: row["most_paid_usd"] / row["budget_usd"]), ".2f"),
                spread(of(lambda row: row["surplus_usd"] / max(row["paid_usd"], 1e-300)), ".2f"),
                spread(of(lambda row: row["least_surplus_usd"] / row["budget_usd"]), ".4f"),
            ]
        cells = [
            "-" if share is None else f"{share:g}",
            name,
            spread(of(lambda row: row["accuracy"]), ".4f"),
            "-" if share is None else spread(of(lambda row: row["accuracy"] - free[row["seed"]]), "+.4f"),
            spread(of(lambda row: row["clients"]), ".1f"),
            spread(of(lambda row: row["delivered"]), ".1f"),
            spread(of(lambda row: row["ever"]), ".1f"),
            *money,
            spread(of(lambda row: row["energy_j"]), ".3f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    unknown = [name for name in _MECHANISMS.value if name not in INCENTIVES]
    if unknown:
        raise ValueError(f"incentives={','.join(unknown)}: expected some of {', '.join(INCENTIVES)}")
    shares = [float(share) for share in _SHARES.value]
    if not all(share > 0 for share in shares):
        raise ValueError(f"budgets={','.join(_SHARES.value)}: expected shares above 0")
    with run_lock(_OUT.value):
        rows = compare()
        write_json(pathlib.Path(_OUT.value) / "rows.json", rows)
        text = table(rows)
        (pathlib.Path(_OUT.value) / "table.md").write_text(text, encoding="utf-8")
        app.say("\n" + text + f"results: {_OUT.value}/table.md, rows.json")


if __name__ == "__main__":
    app.run(main)
