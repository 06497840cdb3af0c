"""The arms of a run: FedAvg, each service, and each service's control, all as runs of the one round loop."""

import pathlib

import numpy as np

from fmfl_jax import streams
from fmfl_jax.data.classification import Rows
from fmfl_jax.experiment.methods.attacks import LabelFlip, SignFlip
from fmfl_jax.experiment.services import costs, teachers
from fmfl_jax.experiment.services.arm import Arm, Inputs, run_arm
from fmfl_jax.experiment.services.config import All, AtRandom
from fmfl_jax.experiment.services.costs import Request
from fmfl_jax.experiment.services.data import controls, hashed, with_public_rows, with_rows_for_clients
from fmfl_jax.experiment.services.silos import silo_arms
from fmfl_jax.experiment.services.students import probabilities
from fmfl_jax.parallel import local_copy
from fmfl_jax.services import augment
from fmfl_jax.services.logit_codecs import full
from fmfl_jax.services.placement import RequestSize
from fmfl_jax.services.teach import ask_mask, feature_alignment, margins


def make_arms(inputs: Inputs, directory: pathlib.Path) -> list[Arm]:
    """FedAvg first, then those of the configured services in their order. directory: for the warm-up of --ask."""
    makers = {
        "distill": lambda: distilled(inputs, directory),
        "generate": lambda: _generated(inputs),
        "augment": lambda: _augmented(inputs),
        "ensemble": lambda: _ensembles(inputs),
        "reweight": lambda: _reweighted(inputs),
        "features": lambda: aligned(inputs),
        "silos": lambda: silo_arms(inputs),
    }
    arms = [Arm("fedavg", inputs.data.task, inputs.settings.fedavg)]
    for name in inputs.config.services:
        if name in makers:
            arms += makers[name]()
    return arms


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
        inputs.model,
        x,
        answers,
        available,
        learning_rate=inputs.settings.taught.server_lr,
        num_steps=config.server_steps,
    )
    return Arm(name, inputs.data.task, inputs.settings.taught, aggregator, tuple(rounds))


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
            inputs,
            Arm("warm-up", inputs.data.task, inputs.settings.taught),
            directory / "warm_up",
            num_rounds=ask.warmup_rounds,
        )
        unsure = 1 - margins(probabilities(inputs.model, local_copy(warm.state.params), pool))
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
                inputs.settings.fedavg,
                None,
                (cost._replace(absent_classes=sum(counted)),),
            )
        )
    return arms


def _ensembles(inputs: Inputs) -> list[Arm]:
    """FedDF, and the FM mixed with the clients' ensemble."""
    config, data, found = inputs.config, inputs.data, inputs.fm_pool
    rate, steps = inputs.settings.taught.server_lr, config.server_steps
    settings = {"fm_weight": config.fm_weight, "learning_rate": rate, "num_steps": steps}
    available, rounds = _served(inputs, _pool_request(inputs))
    x, always = data.pool_rows.x, np.ones_like(available)
    feddf = teachers.taught_by_ensemble(inputs.model, x, None, always, **settings)
    mixed = teachers.taught_by_ensemble(inputs.model, x, found.log_probs, available, **settings)
    return [
        Arm("feddf", data.task, inputs.settings.taught, feddf),
        Arm(f"mixed {config.fm_weight:g}", data.task, inputs.settings.taught, mixed, tuple(rounds)),
    ]


def _reweighted(inputs: Inputs) -> list[Arm]:
    """Re-weighting and FLTrust without attackers; and FedAvg and both under two attacks."""
    config, tuned, task = inputs.config, inputs.settings.fedavg, inputs.data.task
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


def aligned(inputs: Inputs) -> list[Arm]:
    """Feature alignment in local training, ||f_client(x) - f_server(x)||^2, on a set that the FM made: its surest texts
    of the pool, equally many a class; and on as many texts of the pool at random. The clients fetch it once, before the
    first round."""
    data, found = inputs.data, inputs.fm_pool
    strength, features = inputs.settings.fedavg.align_strength, inputs.model.features
    assert features is not None  # ServicesConfig refuses a student without a hidden layer
    num_classes = data.histograms.shape[1]
    wanted = augment.fixed_size_requests(num_classes, per_class=max(1, len(data.pool) // (2 * num_classes)))
    chosen = augment.retrieve(np.exp(found.log_probs), wanted).rows
    random = streams.host_rng(streams.SERVICE_CONTROLS, inputs.seed, 2_000_000).permutation(len(data.pool))
    available, rounds = _served(inputs, _pool_request(inputs))
    fetched = costs.with_broadcast(rounds[0], augment.text_bits([data.pool[i] for i in chosen]), len(data.histograms))
    arms = []
    for name, rows in (("features aligned", chosen), ("features aligned, text at random", random[: len(chosen)])):
        task, place = with_public_rows(data.task, data.pool_rows.x[rows])

        def penalty(params, server, frozen, place=place):
            x = frozen["x"][place:]
            return feature_alignment(features(params, x), features(server, x), strength=strength)

        there = bool(available[0]) or name != "features aligned"
        rounds_of = (fetched,) if name == "features aligned" else ()
        arms.append(Arm(name, task, inputs.settings.fedavg, fm_rounds=rounds_of, penalty=penalty if there else None))
    return arms
