"""An arm of a run: a federation with a service, as a run of the one round loop; and what the FM's part adds to it."""

import pathlib
from typing import NamedTuple

from fmfl_jax.data.classification import LabelledText, Task
from fmfl_jax.experiment.config.cross_device import CrossDeviceConfig
from fmfl_jax.experiment.config.federation import FederationConfig
from fmfl_jax.experiment.cross_device import CrossDeviceResult, run_cross_device
from fmfl_jax.experiment.loop.participation import Record
from fmfl_jax.experiment.loop.records import write_history
from fmfl_jax.experiment.methods.attacks import AttackMethod, NoAttack
from fmfl_jax.experiment.services.config import ServicesConfig
from fmfl_jax.experiment.services.costs import FmRound
from fmfl_jax.experiment.services.data import SeedData
from fmfl_jax.experiment.services.foundation import Answers, FoundationModel, Written
from fmfl_jax.fed.algorithms.fed_opt import Penalty
from fmfl_jax.fed.core.types import Aggregator
from fmfl_jax.models.classifiers import Model


class Tuned(NamedTuple):
    """The clients' learning rate and local epochs; server_lr: of distillation, where there is a teacher;
    align_strength: of feature alignment; teacher_weight: share of a silo's loss that is its teacher's."""

    client_lr: float
    local_epochs: int
    server_lr: float = 0.0
    align_strength: float = 0.0
    teacher_weight: float = 0.0


class Settings(NamedTuple):
    """fedavg: of the arms without a teacher; taught: of those with one at the server; silo: of those with one at every
    client."""

    fedavg: Tuned
    taught: Tuned
    silo: Tuned


class Arm(NamedTuple):
    """name; what the clients train on, and how; what the server does (None: the mean); what the FM's requests came to,
    one a round; who attacks; penalty: of the clients' loss, None for none."""

    name: str
    task: Task
    tuned: Tuned
    aggregator: Aggregator | None = None
    fm_rounds: tuple[FmRound, ...] = ()
    attack: AttackMethod = NoAttack()
    penalty: Penalty | None = None


class Inputs(NamedTuple):
    """Of one seed. fm_pool: the FM's answers on the pool. public: the few texts with labels. generated: None where no
    service needs it, with the FM's scores of it."""

    config: ServicesConfig
    settings: Settings
    model: Model
    fm: FoundationModel
    data: SeedData
    seed: int
    fm_pool: Answers
    public: LabelledText
    generated: Written | None = None
    fm_generated: Answers | None = None


def run_arm(inputs: Inputs, arm: Arm, directory: pathlib.Path, *, num_rounds: int | None = None) -> CrossDeviceResult:
    """The arm's rounds; the FM's part is added to the records, in the result and in directory/metrics.jsonl."""
    config = inputs.config
    rounds = num_rounds or config.num_rounds
    run = CrossDeviceConfig(
        num_rounds=rounds,
        cohort_size=config.cohort_size,
        batch_size=int(arm.task.shards.sizes.max()),  # all rows of a client in one step
        local_epochs=arm.tuned.local_epochs,
        client_lr=arm.tuned.client_lr,
        federation=FederationConfig(attack=arm.attack, attack_fraction=config.attack_fraction),
        network=config.network,
        execution="vmap",
        seed=inputs.seed,
        eval_every=1,
        checkpoint_every=rounds,
    )
    result = run_cross_device(
        run,
        inputs.model,
        arm.task,
        directory,
        label=arm.name,
        aggregator=arm.aggregator,
        penalty=arm.penalty,
        say=lambda line: None,
    )
    history = with_fm_figures(result.history, arm.fm_rounds)
    write_history(directory, history)
    return result._replace(history=history)


def with_fm_figures(history: list[Record], fm_rounds: tuple[FmRound, ...]) -> list[Record]:
    """Each record with its round's FmRound as fm_served, fm_seconds, fm_joules, fm_bytes, fm_price and so on, and the
    sums since the start: total_seconds and total_joules of network and FM together (without a network: of the FM)."""
    out, seconds, joules = [], 0.0, 0.0
    for record in history:
        r = record["round"]
        if 0 < r <= len(fm_rounds):
            record = record | fm_rounds[r - 1].figures()
            seconds, joules = seconds + fm_rounds[r - 1].seconds, joules + fm_rounds[r - 1].joules
        totals = {
            "total_seconds": record.get("seconds", 0.0) + seconds,
            "total_joules": record.get("joules", 0.0) + joules,
        }
        out.append(record | totals)
    return out
