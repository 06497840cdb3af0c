"""The arms of a run: FedAvg, each service, and each service's control, all as runs of the one round loop."""

import pathlib
from typing import NamedTuple

import numpy as np

from fmfl_jax import streams
from fmfl_jax.data.classification import Rows, Task
from fmfl_jax.experiment.config.cross_device import CrossDeviceConfig
from fmfl_jax.experiment.config.federation import FederationConfig
from fmfl_jax.experiment.cross_device import CrossDeviceResult, run_cross_device
from fmfl_jax.experiment.loop.participation import Record
from fmfl_jax.experiment.loop.records import write_history
from fmfl_jax.experiment.methods.attacks import AttackMethod, LabelFlip, NoAttack, SignFlip
from fmfl_jax.experiment.services import costs, teachers
from fmfl_jax.experiment.services.config import All, AtRandom, ServicesConfig
from fmfl_jax.experiment.services.costs import FmRound, Request
from fmfl_jax.experiment.services.data import SeedData, hashed, with_rows_for_clients
from fmfl_jax.experiment.services.foundation import Answers, FoundationModel, Written
from fmfl_jax.experiment.services.students import predicted
from fmfl_jax.fed.core.types import Aggregator
from fmfl_jax.models.classifiers import Model
from fmfl_jax.parallel import local_copy
from fmfl_jax.services import augment
from fmfl_jax.services.logit_codecs import full
from fmfl_jax.services.placement import RequestSize
from fmfl_jax.services.teach import ask_mask, margins


class Tuned(NamedTuple):
    """The clients' learning rate and local epochs; server_lr: of distillation, where there is a teacher."""

    client_lr: float
    local_epochs: int
    server_lr: float = 0.0


class Arm(NamedTuple):
    """name; what the clients train on, and how; what the server does (None: the mean); what the FM's requests came to,
    one a round; who attacks."""

    name: str
    task: Task
    tuned: Tuned
    aggregator: Aggregator | None = None
    fm_rounds: tuple[FmRound, ...] = ()
    attack: AttackMethod = NoAttack()


class Inputs(NamedTuple):
    """Of one seed. tuned: FedAvg's settings; taught: those of the arms with a teacher. fm_pool: the FM's answers on the
    pool. generated: None where no service needs it, with the FM's scores of it."""

    config: ServicesConfig
    tuned: Tuned
    taught: Tuned
    model: Model
    fm: FoundationModel
    data: SeedData
    seed: int
    fm_pool: Answers
    generated: Written | None = None
    fm_generated: Answers | None = None


def make_arms(inputs: Inputs, directory: pathlib.Path) -> list[Arm]:
    """FedAvg first, then those of the configured services in their order. directory: for the warm-up of --ask."""
    makers = {
        "distill": lambda: distilled(inputs, directory),
        "generate": lambda: _generated(inputs),
        "augment": lambda: _augmented(inputs),
        "ensemble": lambda: _ensembles(inputs),
        "reweight": lambda: _reweighted(inputs),
    }
    arms = [Arm("fedavg", inputs.data.task, inputs.tuned)]
    for name in inputs.config.services:
        if name in makers:
            arms += makers[name]()
    return arms


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
        run, inputs.model, arm.task, directory, label=arm.name, aggregator=arm.aggregator, say=lambda line: None
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


def controls(log_probs: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """The answers [N, K] with their rows shuffled, and uniform answers."""
    order = streams.host_rng(streams.SERVICE_CONTROLS, seed, 0).permutation(len(log_probs))
    return {"shuffled": log_probs[order], "uniform": np.full_like(log_probs, -np.log(log_probs.shape[1]))}


def _request(
    texts: list[str], *, up_bits: float, down_bits: float, mean_tokens: int, output_tokens: int = 0
) -> Request:
    """Of these texts together, the bits spread evenly over them."""
    n = max(len(texts), 1)
    size = RequestSize(
        prompt_tokens=mean_tokens, output_tokens=output_tokens, up_bits=up_bits / n, down_bits=down_bits / n
    )
    return Request(len(texts), size)


def _pool_request(inputs: Inputs) -> Request:
    """The whole pool up, all logits down."""
    texts, found = inputs.data.pool, inputs.fm_pool
    down = full(found.log_probs.shape[1]).payload_bits(len(texts))
    return _request(texts, up_bits=augment.text_bits(texts), down_bits=down, mean_tokens=found.mean_tokens)


def _served(inputs: Inputs, request: Request, first_round: int = 0):
    config = inputs.config
    return costs.server_requests(
        config.placement,
        inputs.fm.size,
        request,
        num_rounds=config.num_rounds,
        first_round=first_round,
        seed=inputs.seed,
    )


def _taught(inputs: Inputs, name: str, x: np.ndarray, log_probs: np.ndarray, request_of, first_round: int = 0) -> Arm:
    """The clients' federation with the FM's answers log_probs [N, K] on rows x, distilled while they are there."""
    config = inputs.config
    answers = teachers.sent(log_probs, config.logits)
    available, rounds = _served(inputs, request_of(answers.bits), first_round)
    aggregator = teachers.taught(
        inputs.model, x, answers, available, learning_rate=inputs.taught.server_lr, num_steps=config.server_steps
    )
    return Arm(name, inputs.data.task, inputs.taught, aggregator, tuple(rounds))


def distilled(inputs: Inputs, directory: pathlib.Path) -> list[Arm]:
    """The FM's answers on the pool, distilled; and the same with shuffled and with uniform labels."""
    config, data, found = inputs.config, inputs.data, inputs.fm_pool
    asked, first = np.ones(len(data.pool), bool), 0
    if not isinstance(config.ask, All):
        first = config.ask.warmup_rounds
        asked = _asked(inputs, directory)
    texts = [text for text, chosen in zip(data.pool, asked) if chosen]
    x, log_probs = data.pool_rows.x[asked], found.log_probs[asked]
    up_bits = augment.text_bits(texts)

    def request(bits: int) -> Request:
        return _request(texts, up_bits=up_bits, down_bits=bits, mean_tokens=found.mean_tokens)

    arms = [_taught(inputs, "distill", x, log_probs, request, first)]
    for name, answers in controls(log_probs, inputs.seed).items():
        arms.append(_taught(inputs, f"distill, labels {name}", x, answers, request, first))
    return arms


def _asked(inputs: Inputs, directory: pathlib.Path) -> np.ndarray:
    """bool [N]: the pool's texts that the FM is asked about after a warm-up of FedAvg."""
    ask, pool = inputs.config.ask, inputs.data.pool_rows.x
    assert not isinstance(ask, All)
    budget = max(1, round(ask.fraction * len(pool)))
    if isinstance(ask, AtRandom):
        unsure = streams.host_rng(streams.SERVICE_CONTROLS, inputs.seed, 1).random(len(pool))
    else:
        warm = run_arm(
            inputs, Arm("warm-up", inputs.data.task, inputs.taught), directory / "warm_up", num_rounds=ask.warmup_rounds
        )
        logits = np.asarray(predicted(inputs.model, local_copy(warm.state.params), pool), np.float64)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        unsure = 1 - margins(p / p.sum(axis=1, keepdims=True))
    return ask_mask(unsure, budget=budget)


def _generated(inputs: Inputs) -> list[Arm]:
    """Texts that the FM wrote and scored, without and with shuffled and uniform labels."""
    made, found = inputs.generated, inputs.fm_generated
    assert made is not None and found is not None
    x = hashed(made.texts, inputs.config.data)

    def request(bits: int) -> Request:
        # A class and a count go up; the texts come down with their labels.
        down_bits = augment.text_bits(made.texts) + bits
        tokens, more = found.mean_tokens, inputs.fm.output_tokens
        one = _request(made.texts, up_bits=64.0, down_bits=down_bits, mean_tokens=tokens, output_tokens=more)
        return one._replace(num_texts=made.num_asked)

    arms = [_taught(inputs, "generated", x, found.log_probs, request)]
    for name, answers in controls(found.log_probs, inputs.seed).items():
        label = "generated, no labels" if name == "uniform" else f"generated, labels {name}"
        arms.append(_taught(inputs, label, x, answers, request))
    return arms


def _augmented(inputs: Inputs) -> list[Arm]:
    """Minority classes filled at the clients by public text that the FM gives that label; and by the same text with
    shuffled labels."""
    config, data, found = inputs.config, inputs.data, inputs.fm_pool
    num_classes = data.histograms.shape[1]
    p, cap = np.exp(found.log_probs), config.data.rows_per_client
    served = [augment.retrieve(p, augment.minority_requests(own, cap=cap)) for own in data.histograms]
    requests = []
    for one in served:
        texts = [data.pool[i] for i in one.rows]
        up_bits, down_bits = augment.request_bits(num_classes, cap=cap), augment.text_bits(texts)
        requests.append(_request(texts, up_bits=up_bits, down_bits=down_bits, mean_tokens=found.mean_tokens))
    counted = [
        augment.count_request(augment.minority_requests(own, cap=cap), own).absent_classes for own in data.histograms
    ]
    answered, cost = costs.client_requests(config.placement, inputs.fm.size, requests, seed=inputs.seed)
    arms = []
    for name in ("augment", "augment, labels shuffled"):
        rows = []
        for client, one in enumerate(served):
            kept = one.rows if answered[client] else one.rows[:0]
            labels = one.labels if answered[client] else one.labels[:0]
            if name != "augment":
                labels = streams.host_rng(streams.SERVICE_CONTROLS, inputs.seed, 2 + client).permutation(labels)
            rows.append(Rows(data.pool_rows.x[kept], labels))
        arms.append(
            Arm(
                name,
                with_rows_for_clients(data.task, rows),
                inputs.tuned,
                None,
                (cost._replace(absent_classes=sum(counted)),),
            )
        )
    return arms


def _ensembles(inputs: Inputs) -> list[Arm]:
    """FedDF, and the FM mixed with the clients' ensemble."""
    config, data, found = inputs.config, inputs.data, inputs.fm_pool
    rate, steps = inputs.taught.server_lr, config.server_steps
    settings = {"fm_weight": config.fm_weight, "learning_rate": rate, "num_steps": steps}
    available, rounds = _served(inputs, _pool_request(inputs))
    x, always = data.pool_rows.x, np.ones_like(available)
    feddf = teachers.taught_by_ensemble(inputs.model, x, None, always, **settings)
    mixed = teachers.taught_by_ensemble(inputs.model, x, found.log_probs, available, **settings)
    return [
        Arm("feddf", data.task, inputs.taught, feddf),
        Arm(f"mixed {config.fm_weight:g}", data.task, inputs.taught, mixed, tuple(rounds)),
    ]


def _reweighted(inputs: Inputs) -> list[Arm]:
    """Re-weighting and FLTrust without attackers; and FedAvg and both under two attacks."""
    config, tuned, task = inputs.config, inputs.tuned, inputs.data.task
    available, served = _served(inputs, _pool_request(inputs))
    rounds, given = tuple(served), (inputs.model, inputs.data.pool_rows.x, inputs.fm_pool.log_probs.argmax(axis=1))
    temperature, floor = config.reweight_temperature, config.reweight_floor
    weighed = teachers.reweighted(*given, available, temperature=temperature, floor=floor)
    steps, rate = tuned.local_epochs, tuned.client_lr
    trusting = teachers.trusting(*given, available, learning_rate=rate, num_steps=steps)
    arms = [Arm("reweight", task, tuned, weighed, rounds), Arm("fltrust", task, tuned, trusting, rounds)]
    for name, attack in (("label flip", LabelFlip()), ("sign flip", SignFlip())):
        arms.append(Arm(f"fedavg, {name}", task, tuned, None, (), attack))
        arms.append(Arm(f"reweight, {name}", task, tuned, weighed, rounds, attack))
        arms.append(Arm(f"fltrust, {name}", task, tuned, trusting, rounds, attack))
    return arms
