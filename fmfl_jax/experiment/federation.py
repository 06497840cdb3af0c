"""From a checked configuration to what the round loop runs: algorithm, view of the model, the loop's parts."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax

from fmfl_jax.config import LlamaConfig
from fmfl_jax.data.batches import poisson_capacity, poisson_client_batches
from fmfl_jax.experiment.async_schedule import BufferedTurns
from fmfl_jax.experiment.client_counts import DEFAULT_SHARE
from fmfl_jax.experiment.config import CaseStudyConfig, Tuning, make_uplink
from fmfl_jax.experiment.federation_config import FederationConfig, number_of, split_spec
from fmfl_jax.experiment.federation_privacy import make_codec, noise_multiplier, protocol, quorum, spent_on
from fmfl_jax.experiment.over_the_air import over_the_air
from fmfl_jax.experiment.per_client import hold_out, make_client_evaluator
from fmfl_jax.experiment.rounds import ClientData, Parts, RoundsConfig, plain_batches
from fmfl_jax.fed import attacks, robust, selection
from fmfl_jax.fed.algorithm import Aggregator, Delivery, FederatedAlgorithm
from fmfl_jax.fed.apfl import apfl
from fmfl_jax.fed.ditto import ditto
from fmfl_jax.fed.fed_buff import fed_buff
from fmfl_jax.fed.fed_opt import fed_opt
from fmfl_jax.fed.lora.bias import with_aggregation_bias
from fmfl_jax.fed.lora.factors import factor_bits, pairs_of
from fmfl_jax.fed.lora.ffa_lora import freeze_a
from fmfl_jax.fed.lora.flex_lora import flex_lora
from fmfl_jax.fed.lora.flora import Target, flora, flora_bits, split_params
from fmfl_jax.fed.lora.het_lora import het_lora
from fmfl_jax.fed.privacy.dp_fedavg import AdaptiveClipping, dp_fedavg
from fmfl_jax.fed.privacy.dp_sgd import MaskedBatch, private_grad_fn
from fmfl_jax.fed.private import join_ranks, private, split_ranks
from fmfl_jax.fed.scaffold import scaffold
from fmfl_jax.fed.secure.aggregator import secure
from fmfl_jax.fed.secure.fixed_point import FixedPoint, payload_bits, rounding_norm
from fmfl_jax.fed.shares import nearest_count
from fmfl_jax.fed.uplink import tree_bits
from fmfl_jax.models.loss import token_nll
from fmfl_jax.models.params import projections
from fmfl_jax.peft.split import Split

_HET_GAMMA, _HET_REGULARIZATION = 0.99, 5e-3  # HetLoRA's rank decay and regularization: this project's choice
_HELD_OUT, _MOST_HELD_OUT = 0.1, 16  # of a client's windows, to evaluate its own model on
_DURATIONS = 9  # first word of a seed; the streams of selection and schedule have 5 to 8
_ALPHA_RATE = 0.1  # of APFL's learned alpha: this project's choice


class Federation(NamedTuple):
    """What `run_rounds` takes, and how to read its result.

    trainable, frozen: what the algorithm trains and what it does not. merge(params, frozen) -> the model with what
    `algorithm.shared` or `.personal` gives. tuned(params) -> these in the names of the way of tuning, for export.
    uplink_bits: of a client's message, int, or int64 [num_clients] where they differ. downlink_bits: of what one
    receives.
    data: what the clients train on; of clients with models of their own some windows are held out.
    """

    algorithm: FederatedAlgorithm
    trainable: dict
    frozen: dict
    merge: Callable
    tuned: Callable
    parts: Parts
    uplink_bits: int | np.ndarray
    downlink_bits: int
    data: ClientData


class View(NamedTuple):
    """A model as an algorithm sees it. merge: what is differentiated; evaluate: what is evaluated. tuned: see
    Federation. targets: FLoRA's."""

    merge: Callable
    trainable: dict
    frozen: dict
    evaluate: Callable
    tuned: Callable
    targets: tuple[Target, ...] = ()


def make_federation(
    config: CaseStudyConfig,
    tuning: Tuning,
    model: Split,
    model_config: LlamaConfig,
    data: ClientData,
    *,
    root: np.ndarray,
) -> Federation:
    """The federation of one way of tuning; its `parts` have no network yet.

    data: the clients' training windows. root: int32 [W, T+1], windows of the server's own, for aggregators that compare
    with them. Raises ValueError where names or numbers fit no method.
    """
    fed, rounds = config.federation, config.rounds
    held = None
    if split_spec(fed.personalization)[0] != "none" or fed.algorithm == "fedsa_lora":
        data, held = hold_out(data, _HELD_OUT, most=_MOST_HELD_OUT, seed=rounds.seed)
    view = view_of(fed, model, model_config)
    sizes = np.asarray([len(indices) for indices in data.client_indices])
    noise = noise_multiplier(fed, rounds, sizes)

    def loss_fn(trainable, frozen, windows, key):
        return token_nll(view.merge(trainable, frozen), windows, dropout_key=key, remat=config.remat).mean()

    if "dp_sgd" in fed.privacy:
        grad_fn = private_grad_fn(
            loss_fn, clip_norm=fed.dp.clip, noise_multiplier=noise, expected_batch_size=rounds.batch_size
        )
    else:
        grad_fn = jax.value_and_grad(loss_fn)
    codec = make_codec(fed, rounds, len(sizes)) if "secure" in fed.privacy else None
    aggregator = make_aggregator(fed, rounds, sizes, noise, codec, view.trainable)
    on_air = "survivors" if config.air is None else config.air.aggregation
    if on_air.startswith("over_the_air"):
        aggregator = over_the_air(truncated=on_air.endswith("truncated"))
    delivery = Delivery(
        clients_per_pass=rounds.clients_per_pass,
        uplink=make_uplink(config.uplink),
        aggregator=aggregator,
        attack=message_attack(fed.attack),
        substitute_lost=on_air == "last_delta",
    )
    ranks = tuple(fed.ranks[i % len(fed.ranks)] for i in range(len(sizes))) if fed.ranks else None
    algorithm = make_algorithm_of(fed, config, tuning, view, grad_fn, delivery, ranks, len(sizes))
    uplink, downlink = traffic_bits(fed, rounds, algorithm, view, delivery, codec, ranks)
    deadline_s = None if config.air is None else config.air.deadline_s
    parts = Parts(
        selector=make_selector(fed, rounds, sizes, deadline_s),
        weigh=make_weigh(fed, aggregator),
        batches=make_batches(fed, rounds, data, model_config),
        root=root_batches(rounds, root) if aggregator.needs_reference else None,
        extras=extras_of(fed, rounds, len(sizes)),
        spent=spent_on(fed, rounds, sizes, noise),
        quorum=None if codec is None else quorum,
        on_exports=None if codec is None else protocol(codec),
        uplink_bits=None if codec is None else uplink,
    )
    if held is not None:
        parts = dataclasses.replace(
            parts, evaluate_clients=make_client_evaluator(view.evaluate, algorithm.shared, algorithm.personal, held)
        )
    if fed.algorithm == "fedbuff":
        parts = dataclasses.replace(
            parts,
            turns=BufferedTurns(
                durations_s=drawn_durations_s(rounds, len(sizes)),
                buffer_size=buffer_size(fed, rounds),
                concurrency=rounds.cohort_size,
                seed=rounds.seed,
            ),
        )
    return Federation(algorithm, view.trainable, view.frozen, view.evaluate, view.tuned, parts, uplink, downlink, data)


def view_of(fed: FederationConfig, model: Split, model_config: LlamaConfig) -> View:
    """FFA-LoRA freezes the A's; FLoRA trains beside the adapted base matrices, in float32; a private LoRA has its last
    ranks under names of their own."""
    if fed.algorithm == "ffa_lora":
        merge, trainable, frozen = freeze_a(model.merge, model.trainable, model.frozen)
        fixed = {name: value for name, value in model.trainable.items() if name not in trainable}
        return View(merge, trainable, frozen, merge, lambda params: params | fixed)
    if fed.algorithm == "flora":
        return _flora_view(model, model_config)
    if split_spec(fed.personalization)[0] == "private_lora":
        shared, own = split_ranks(model.trainable, private_rank(fed))
        merge = lambda params, frozen: model.merge(join_ranks(params), frozen)
        return View(merge, shared | own, model.frozen, merge, join_ranks)
    return View(model.merge, model.trainable, model.frozen, model.merge, lambda params: params)


def _flora_view(model: Split, model_config: LlamaConfig) -> View:
    targets = []
    for name, p in projections(model_config).items():
        stem = f"{p.matrix}.lora.{name.rpartition('.')[2]}"
        if f"{stem}.lora_a" in model.trainable:
            columns = p.columns
            targets.append(
                Target(f"{stem}.lora_a", f"{stem}.lora_b", f"{p.matrix}.weight", columns.start, columns.stop)
            )
    targets = tuple(targets)
    names = {target.weight for target in targets}
    weights = {name: model.frozen[name].astype("float32") for name in names}
    frozen = {name: value for name, value in model.frozen.items() if name not in names}

    def evaluate(params, frozen):
        factors, weights = split_params(params, targets)
        return model.merge(factors, frozen | weights)

    return View(model.merge, model.trainable | weights, frozen, evaluate, lambda params: params, targets)


def make_algorithm_of(
    fed: FederationConfig,
    config: CaseStudyConfig,
    tuning: Tuning,
    view: View,
    grad_fn: Callable,
    delivery: Delivery,
    ranks: tuple[int, ...] | None,
    num_clients: int,
) -> FederatedAlgorithm:
    """The named algorithm or personalization, with the server's optimizer."""
    optimizer, server = client_optimizer(fed, tuning.learning_rate), config.server.make()
    match fed.algorithm:
        case "scaffold":
            return scaffold(grad_fn, tuning.learning_rate, server, num_clients=num_clients, delivery=delivery)
        case "fedbuff":
            return fed_buff(grad_fn, optimizer, server, delivery=delivery)
        case "flora":
            return flora(grad_fn, optimizer, view.targets, scale=tuning.peft.scale, ranks=ranks, delivery=delivery)
        case "flexlora":
            return flex_lora(grad_fn, optimizer, ranks=ranks, delivery=delivery)
        case "hetlora":
            return het_lora(
                grad_fn, optimizer, gamma=_HET_GAMMA, regularization=_HET_REGULARIZATION, ranks=ranks, delivery=delivery
            )
        case "fedsa_lora":
            return private(
                grad_fn, optimizer, server, initial=named(view, lambda name: name.endswith("lora_b")), delivery=delivery
            )
    name, _ = split_spec(fed.personalization)
    shared = {"delivery": delivery} | ({"proximal": fed.proximal} if fed.proximal else {})
    match name:
        case "ditto":
            return ditto(
                grad_fn, optimizer, server, strength=number_of("personalization", fed.personalization), **shared
            )
        case "apfl":
            learned = fed.personalization == "apfl:learned"
            alpha = 0.5 if learned else number_of("personalization", fed.personalization)
            return apfl(
                grad_fn, optimizer, server, alpha=alpha, alpha_learning_rate=_ALPHA_RATE if learned else None, **shared
            )
        case "fedper" | "fedrep":
            steps = max(1, config.rounds.local_steps // 2) if name == "fedrep" else None
            return private(
                grad_fn,
                optimizer,
                server,
                initial=last_layers(view, fed.personalization),
                private_steps=steps,
                **shared,
            )
        case "private_lora":
            return private(
                grad_fn, optimizer, server, initial=named(view, lambda name: name.endswith(".private")), **shared
            )
    return fed_opt(grad_fn, optimizer, server, **shared)


def client_optimizer(fed: FederationConfig, learning_rate: float) -> optax.GradientTransformation:
    """The clients' optimizer, fresh in every round."""
    return optax.sgd(learning_rate) if fed.client_optimizer == "sgd" else optax.adamw(learning_rate, weight_decay=0.0)


def named(view: View, chosen: Callable) -> dict:
    """The trainable parameters whose name is chosen."""
    return {name: value for name, value in view.trainable.items() if chosen(name)}


def last_layers(view: View, spec: str) -> dict:
    """What is trained in the last layers, as many as `spec` says. Raises ValueError where that is nothing or all."""
    count = int(number_of("personalization", spec))
    layer_of = {name: int(name.split(".")[1]) for name in view.trainable if name.startswith("layers.")}
    first = max(layer_of.values(), default=-1) + 1 - count
    found = named(view, lambda name: layer_of.get(name, -1) >= max(first, 0))
    if count < 1 or not found or len(found) == len(view.trainable):
        raise ValueError(
            f"--personalization={spec} makes {len(found)} of {len(view.trainable)} tuned arrays private: "
            "expected some, and not all, in whole layers"
        )
    return found


def private_rank(fed: FederationConfig) -> int:
    """How many ranks of the LoRA are private."""
    return int(number_of("personalization", fed.personalization))


def buffer_size(fed: FederationConfig, rounds: RoundsConfig) -> int:
    """FedBuff's K."""
    return fed.buffer_size or nearest_count(0.5, rounds.cohort_size)


def drawn_durations_s(rounds: RoundsConfig, num_clients: int) -> np.ndarray:
    """Mean durations without a network: log-normal around 1 s, a few clients several times slower than most."""
    return np.random.default_rng((_DURATIONS, rounds.seed)).lognormal(sigma=0.75, size=num_clients)


def make_aggregator(
    fed: FederationConfig,
    rounds: RoundsConfig,
    sizes: np.ndarray,
    noise: float | None,
    codec: FixedPoint | None,
    template: dict,
) -> Aggregator:
    """The robust, private or secure mean, or a plain one."""
    aggregator = robust_aggregator(fed.aggregator)
    if "dp" in fed.privacy:
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
    return with_aggregation_bias(aggregator) if fed.aggregation_bias else aggregator


def make_weigh(fed: FederationConfig, aggregator: Aggregator) -> Callable | None:
    """A client's weight by its number of examples; None: the number itself."""
    return aggregator.weigh or (np.ones_like if fed.uniform_weights else None)


def robust_aggregator(spec: str) -> Aggregator:
    """The aggregator that `spec` names. Raises ValueError for a missing or impossible number."""
    name, _ = split_spec(spec)
    number = lambda default=None: number_of("aggregator", spec, default)
    match name:
        case "median":
            return robust.median()
        case "trimmed_mean":
            return robust.trimmed(number(DEFAULT_SHARE))
        case "krum":
            return robust.krum(number(DEFAULT_SHARE))
        case "multi_krum":
            return robust.multi_krum(number(DEFAULT_SHARE))
        case "geometric_median":
            return robust.geometric_median()
        case "norm_bound":
            return robust.norm_bound(number())
        case "fltrust":
            return robust.fltrust()
    return Aggregator()


def message_attack(spec: str) -> Callable | None:
    """What `spec` makes of the malicious clients' messages; None where it leaves them alone."""
    name, _ = split_spec(spec)
    number = lambda default=None: number_of("attack", spec, default)
    match name:
        case "sign_flip":
            return attacks.sign_flip(number(1.0))
        case "scale":
            return attacks.scaling(number(10.0))
        case "alie":
            return attacks.alie(number() if ":" in spec else None)
        case "ipm":
            return attacks.inner_product(number(0.5))
        case "noise":
            return attacks.gaussian(number())
    return None


def extras_of(fed: FederationConfig, rounds: RoundsConfig, num_clients: int) -> dict:
    """What the round wants to know of every client."""
    if fed.attack == "none":
        return {}
    return {"malicious": attacks.malicious_clients(num_clients, fed.attack_fraction, rounds.seed)}


def make_batches(fed: FederationConfig, rounds: RoundsConfig, data: ClientData, model_config: LlamaConfig) -> Callable:
    """batches(client_ids, round) -> windows [K, S, B, T+1], or MaskedBatch of Poisson samples for private examples;
    those of clients that flip labels in a cipher."""
    malicious = (
        extras_of(fed, rounds, len(data.client_indices)).get("malicious") if fed.attack == "label_flip" else None
    )
    plain = plain_batches(rounds, data)
    if "dp_sgd" in fed.privacy:
        sizes = [len(indices) for indices in data.client_indices]
        capacity = poisson_capacity(
            sizes, batch_size=rounds.batch_size, num_steps=rounds.num_rounds * rounds.local_steps
        )

    def batches(client_ids, r):
        if "dp_sgd" in fed.privacy:
            drawn = poisson_client_batches(
                data.windows,
                data.client_indices,
                client_ids=client_ids,
                round=r,
                seed=rounds.seed,
                local_steps=rounds.local_steps,
                batch_size=rounds.batch_size,
                capacity=capacity,
            )
            made = MaskedBatch(drawn.tokens, drawn.mask)
        else:
            made = plain(client_ids, r)
        if malicious is None:
            return made

        def flipped(tokens):
            return attacks.permute_vocabulary(tokens, malicious[client_ids], model_config.vocab_size, rounds.seed)

        return made._replace(examples=flipped(made.examples)) if isinstance(made, MaskedBatch) else flipped(made)

    return batches


def root_batches(rounds: RoundsConfig, root: np.ndarray) -> Callable:
    """root(round) -> windows [S, B, T+1] of the server's own."""
    one = plain_batches(rounds, ClientData(root, [np.arange(len(root))]))
    return lambda r: one(np.zeros(1, np.int64), r)[0]


def make_selector(
    fed: FederationConfig, rounds: RoundsConfig, sizes: np.ndarray, deadline_s: float | None = None
) -> selection.Selector:
    """Who takes part."""
    size = rounds.cohort_size
    match fed.selection:
        case "poisson":
            return selection.poisson(size / len(sizes))
        case "oort":
            return selection.oort(size, sizes)
        case "deadline":
            return selection.deadline_aware(size, deadline_s)
    return selection.uniform(size)


def traffic_bits(
    fed: FederationConfig,
    rounds: RoundsConfig,
    algorithm: FederatedAlgorithm,
    view: View,
    delivery: Delivery,
    codec: FixedPoint | None,
    ranks: tuple[int, ...] | None,
):
    """(uplink bits of a client's message, an int or int64 [num_clients]; downlink bits of what one receives)."""
    state = jax.eval_shape(lambda params: algorithm.init(params, rounds.seed), view.trainable)
    message, download = algorithm.message_like(state.params), tree_bits(algorithm.download(state.params, state.extra))
    if codec is not None:
        return payload_bits(codec, message), download
    if delivery.uplink is not None:
        return delivery.uplink.exact_bits(message), download
    if fed.algorithm == "flora":
        cohort = ranks or (view.trainable[view.targets[0].a].shape[1],) * rounds.cohort_size
        uplink, _ = flora_bits(view.trainable, view.targets, cohort)
        return np.asarray(uplink) if ranks else uplink[0], round(rounds.cohort_size * float(np.mean(uplink)))
    if ranks:
        bits = np.asarray([factor_bits(view.trainable, pairs_of(view.trainable), rank) for rank in ranks])
        return bits, round(float(bits.mean()))
    return tree_bits(message), download
