"""From a checked configuration to what the round loop runs, whatever the model: round, schedule, callbacks, traffic."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
import optax

from fmfl_jax import streams
from fmfl_jax.experiment.build import contributions, privacy
from fmfl_jax.experiment.config.federation import FederationConfig
from fmfl_jax.experiment.config.rounds import RoundsConfig
from fmfl_jax.experiment.config.server import ServerConfig
from fmfl_jax.experiment.loop.buffered import BufferedSchedule
from fmfl_jax.experiment.loop.market import J_PER_KWH, Market
from fmfl_jax.experiment.loop.participation import CohortSchedule, Schedule
from fmfl_jax.experiment.loop.rounds import Callback
from fmfl_jax.experiment.methods.aggregators import Mean
from fmfl_jax.experiment.methods.algorithms import FedAvg, FedBuff, Parts
from fmfl_jax.experiment.methods.attacks import NoAttack
from fmfl_jax.experiment.methods.contributions import ComFedSV
from fmfl_jax.experiment.methods.incentives import INCENTIVES, MarketInputs
from fmfl_jax.experiment.methods.names import name_of
from fmfl_jax.experiment.methods.selections import SelectionInputs
from fmfl_jax.experiment.network import rounds as network_rounds
from fmfl_jax.experiment.network.aircomp import over_the_air
from fmfl_jax.experiment.network.rounds import NetworkJob
from fmfl_jax.fed import attacks
from fmfl_jax.fed.aggregators.dp_fedavg import AdaptiveClipping, dp_fedavg
from fmfl_jax.fed.aggregators.secure import secure
from fmfl_jax.fed.algorithms.fed_opt import Penalty
from fmfl_jax.fed.algorithms.lora.bias import with_aggregation_bias
from fmfl_jax.fed.algorithms.lora.flora import Target
from fmfl_jax.fed.core.round import Round, Transport, make_round
from fmfl_jax.fed.core.types import (
    Aggregator,
    Execution,
    FederatedAlgorithm,
    GradFn,
    LossFn,
    Optimizer,
    Params,
    Traffic,
)
from fmfl_jax.fed.privacy.dp_sgd import private_grad_fn
from fmfl_jax.fed.secure.fixed_point import FixedPoint, rounding_norm
from fmfl_jax.fed.shares import nearest_count


class Learner(NamedTuple):
    """What the clients train, as their algorithm sees it. loss_fn: see LossFn. trainable: as it starts. layers: the
    names of the trained parameters, layer by layer. targets, scale, penalty: see `Parts`. learning_rate,
    client_optimizer ("adamw" or "sgd"): of the clients, where neither configuration nor method asks for another."""

    loss_fn: LossFn
    trainable: Params
    learning_rate: float
    layers: tuple[tuple[str, ...], ...] = ()
    targets: tuple[Target, ...] = ()
    scale: float = 1.0
    client_optimizer: str = "adamw"
    penalty: Penalty | None = None


class Federation(NamedTuple):
    """What `run_rounds` runs. traffic: as planned at the start, uplink by client where they differ. job: the network's,
    None without. after_round, at_evaluation: the callbacks that the methods ask for."""

    round: Round
    schedule: Schedule
    traffic: Traffic
    job: NetworkJob | None
    after_round: tuple[Callback, ...]
    at_evaluation: tuple[Callback, ...]


def make_federation(
    fed: FederationConfig,
    rounds: RoundsConfig,
    server: ServerConfig,
    learner: Learner,
    *,
    sizes: np.ndarray,
    execution: Execution,
    job: NetworkJob | None = None,
    aggregator: Aggregator | None = None,
    loss: contributions.Loss | None = None,
) -> Federation:
    """The federation.

    sizes: int [num_clients], examples of each. job: the network that the rounds go over; its bits are filled in here.
    aggregator: one of the caller's; None: the configured. loss: what contributions are measured by, where they are.
    Raises ValueError where names or numbers fit no method, and for a caller's aggregator beside a configured one,
    privacy, a measure of contributions or a network that adds on the air.
    """
    noise = privacy.noise_multiplier(fed, rounds, sizes)
    codec = privacy.make_codec(fed, rounds, len(sizes)) if "secure" in fed.privacy else None
    aggregation = "survivors" if job is None else job.aggregation
    analog = job is not None and job.analog
    if aggregator is not None and (analog or fed.privacy or fed.aggregator != Mean() or fed.contribution is not None):
        raise ValueError(
            "an aggregator of the caller's takes the place of privacy=..., aggregator=... and a network's "
            "aggregation=over_the_air, and shows no contribution=...: give one"
        )
    if analog:
        aggregator = over_the_air(truncated=aggregation.endswith("truncated"))
    elif aggregator is None:
        aggregator = make_aggregator(fed, rounds, sizes, noise, codec, learner.trainable)
    algorithm = make_algorithm(
        fed, rounds, server, learner, make_grad_fn(fed, rounds, learner.loss_fn, noise), len(sizes)
    )
    parts = make_round(
        algorithm,
        transport=Transport(codec=fed.uplink.make(), substitute_lost=aggregation == "last_delta"),
        aggregator=aggregator,
        attack=fed.attack.make(),
        execution=execution,
    )
    after_round: list[Callback] = [] if codec is None else [privacy.secure_protocol(codec)]
    if fed.contribution is not None:
        assert loss is not None  # whoever configures the measure says what it measures by
        after_round.append(contributions.measure(fed.contribution, loss, num_clients=len(sizes), seed=rounds.seed))
    state = jax.eval_shape(lambda params: parts.init(params, rounds.seed), learner.trainable)
    traffic = parts.traffic(state, np.arange(len(sizes)), None, rounds.cohort_size)
    if job is not None:
        job = dataclasses.replace(job, uplink_bits=traffic.uplink_bits, downlink_bits=traffic.downlink_bits)
    return Federation(
        parts,
        make_schedule(fed, rounds, sizes, aggregator, job),
        traffic,
        None if isinstance(fed.algorithm, FedBuff) else job,
        tuple(after_round),
        privacy.accounting(fed, rounds, sizes, noise),
    )


def make_grad_fn(fed: FederationConfig, rounds: RoundsConfig, loss_fn: LossFn, noise: float | None) -> GradFn:
    """The gradient of a client's step: plain, or DP-SGD's."""
    if "dp_sgd" not in fed.privacy:
        return jax.value_and_grad(loss_fn)
    assert fed.dp is not None and noise is not None  # FederationConfig refuses dp_sgd without its numbers
    return private_grad_fn(
        loss_fn, clip_norm=fed.dp.clip, noise_multiplier=noise, expected_batch_size=rounds.batch_size
    )


def make_algorithm(
    fed: FederationConfig,
    rounds: RoundsConfig,
    server: ServerConfig,
    learner: Learner,
    grad_fn: GradFn,
    num_clients: int,
) -> FederatedAlgorithm:
    """The configured algorithm, or the personalization in its place."""
    ranks = tuple(fed.lora_ranks[i % len(fed.lora_ranks)] for i in range(num_clients)) if fed.lora_ranks else None
    parts = Parts(
        grad_fn=grad_fn,
        client_optimizer=client_optimizer(fed, learner),
        client_lr=learner.learning_rate,
        server_optimizer=server.make(),
        trainable=learner.trainable,
        num_clients=num_clients,
        local_steps=rounds.local_steps,
        layers=learner.layers,
        targets=learner.targets,
        scale=learner.scale,
        ranks=ranks,
        penalty=learner.penalty,
    )
    if learner.penalty is not None and (type(fed.algorithm) is not FedAvg or fed.personalization is not None):
        raise ValueError("a penalty of the caller's goes with algorithm=fedavg, without personalization")
    if fed.personalization is not None:
        return fed.personalization.make(parts, fed.proximal)
    return fed.algorithm.make(parts)


def client_optimizer(fed: FederationConfig, learner: Learner) -> Optimizer:
    """The clients' optimizer, fresh in every round: the configured one, else what the method needs, else the
    learner's."""
    name = fed.client_optimizer or ("sgd" if fed.algorithm.sgd_only else learner.client_optimizer)
    if name == "sgd":
        return optax.sgd(learner.learning_rate)
    return optax.adamw(learner.learning_rate, weight_decay=0.0)


def make_aggregator(
    fed: FederationConfig,
    rounds: RoundsConfig,
    sizes: np.ndarray,
    noise: float | None,
    codec: FixedPoint | None,
    template: Params,
) -> Aggregator:
    """The robust, private or secure mean, or a plain one."""
    aggregator = fed.aggregator.make()
    if "dp" in fed.privacy:
        assert fed.dp is not None and noise is not None  # FederationConfig refuses dp without its numbers
        adaptive = None if fed.dp.adaptive_quantile is None else AdaptiveClipping(quantile=fed.dp.adaptive_quantile)
        aggregator = dp_fedavg(
            clip_norm=fed.dp.clip,
            noise_multiplier=noise,
            expected_cohort=rounds.cohort_size,
            weighting="uniform" if fed.dp.cap is None else "capped",
            cap=fed.dp.cap,
            adaptive=adaptive,
            slack=0.0 if codec is None else rounding_norm(codec, template),
        )
    if codec is not None:
        max_weight = 1.0 if fed.uniform_weights else float(sizes.max())
        aggregator = secure(aggregator, codec, max_weight=max_weight, seed=rounds.seed)
    if fed.contribution is not None:
        aggregator = contributions.with_exports(aggregator)
    return with_aggregation_bias(aggregator) if fed.aggregation_bias else aggregator


def make_schedule(
    fed: FederationConfig, rounds: RoundsConfig, sizes: np.ndarray, aggregator: Aggregator, job: NetworkJob | None
) -> Schedule:
    """Cohorts by the configured selection; for FedBuff who is done when."""
    if isinstance(fed.algorithm, FedBuff):
        durations_s, start_s = client_durations_s(rounds, len(sizes), job)
        return BufferedSchedule(
            durations_s=durations_s,
            buffer_size=fed.algorithm.buffer_size or nearest_count(0.5, rounds.cohort_size),
            concurrency=rounds.cohort_size,
            seed=rounds.seed,
            start_s=start_s,
        )
    deadline_s = None if job is None else float(job.network.deadline_s)
    weighting = aggregator.weighting or (np.ones_like if fed.uniform_weights else None)
    sizes = np.asarray(sizes, np.float32)
    return CohortSchedule(
        selector=fed.selection.make(SelectionInputs(rounds.cohort_size, sizes, deadline_s)),
        sizes=sizes,
        seed=rounds.seed,
        job=job,
        weighting=weighting,
        quorum=privacy.quorum if "secure" in fed.privacy else None,
        market=make_market(fed, rounds.cohort_size, sizes if weighting is None else weighting(sizes)),
        everybody_first=isinstance(fed.contribution, ComFedSV),
    )


def make_market(fed: FederationConfig, cohort_size: int, weights: np.ndarray) -> Market | None:
    """The market of the configured incentive, in which clients are worth their weights; None without."""
    if fed.incentive is None:
        return None
    return Market(
        offers=fed.incentive.make(MarketInputs(cohort_size, np.asarray(weights, np.float64))),
        usd_per_j=fed.energy_usd_per_kwh / J_PER_KWH,
        name=name_of(fed.incentive, INCENTIVES),
    )


def client_durations_s(rounds: RoundsConfig, num_clients: int, job: NetworkJob | None) -> tuple[np.ndarray, float]:
    """(mean seconds of each client's work, seconds before the first starts). Without a network log-normal around 1 s: a
    few clients several times slower than most."""
    if job is None:
        return streams.host_rng(streams.CLIENT_DURATION, rounds.seed).lognormal(sigma=0.75, size=num_clients), 0.0
    network = network_rounds.start(job, rounds.seed)
    return network_rounds.predicted_s(job, network, rounds.cohort_size), network.seconds


def client_extras(fed: FederationConfig, rounds: RoundsConfig, num_clients: int) -> dict[str, np.ndarray]:
    """What the round wants to know of every client: who attacks."""
    if isinstance(fed.attack, NoAttack):
        return {}
    return {"malicious": attacks.malicious_clients(num_clients, fed.attack_fraction, rounds.seed)}
