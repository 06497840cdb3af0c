"""The flags of the federated algorithm: who trains, what is sent, how it is aggregated, protected and attacked."""

from absl import flags

from fmfl_jax.experiment.config.federation import PRIVACIES, DpConfig, FederationConfig
from fmfl_jax.experiment.config.server import ServerConfig
from fmfl_jax.experiment.methods.aggregators import AGGREGATORS
from fmfl_jax.experiment.methods.algorithms import ALGORITHMS, FedBuff
from fmfl_jax.experiment.methods.attacks import ATTACKS
from fmfl_jax.experiment.methods.codecs import CODECS
from fmfl_jax.experiment.methods.contributions import CONTRIBUTIONS
from fmfl_jax.experiment.methods.incentives import INCENTIVES
from fmfl_jax.experiment.methods.names import parse_method
from fmfl_jax.experiment.methods.personalizations import PERSONALIZATIONS
from fmfl_jax.experiment.methods.selections import SELECTIONS

# FedOpt's members by their own names: --algorithm=fedadam is FedAvg with the server optimizer fedadam.
_OPTIMIZERS = ("fedadam", "fedyogi", "fedadagrad")

_ALGORITHM = flags.DEFINE_string(
    "algorithm",
    "fedavg",
    f"One of {', '.join(ALGORITHMS)}; or fedavgm, {', '.join(_OPTIMIZERS)}: fedavg with that server optimizer. Not "
    "verified against its authors' text: hetlora's pruning, which here decides once for all matrices of a client.",
)
_PROXIMAL = flags.DEFINE_float("proximal", 0.0, "FedProx's mu.")
_SERVER = flags.DEFINE_string(
    "server_optimizer",
    "sgd",
    "On the mean delta: sgd (with --server_lr=1 FedAvg), optax's "
    "adam, yogi, adagrad, or Reddi et al.'s fedadam, fedyogi, fedadagrad.",
)
_SERVER_LR = flags.DEFINE_float(
    "server_lr", None, "Learning rate of the server optimizer; default 1 for sgd, else 0.01."
)
_MOMENTUM = flags.DEFINE_float("server_momentum", None, "Momentum of the server's sgd; default 0, of fedavgm 0.9.")
_CLIENT = flags.DEFINE_string("client_optimizer", None, "adamw or sgd; default adamw, of scaffold sgd.")
_PERSONALIZATION = flags.DEFINE_string(
    "personalization",
    "none",
    f"none or one of {', '.join(PERSONALIZATIONS)}, with its degree: "
    "ditto:LAMBDA, apfl:ALPHA or apfl:learned, fedper:LAYERS and fedrep:LAYERS (the "
    "last layers are private), private_lora:RANK (of --lora_rank).",
)
_UPLINK = flags.DEFINE_string(
    "uplink",
    "identity",
    "What a client sends: identity, qsgd:LEVELS, rounding:BITS, "
    "topk:FRACTION or lowrank:RANK, with error feedback but for qsgd.",
)
_AGGREGATOR = flags.DEFINE_string(
    "aggregator",
    "mean",
    f"One of {', '.join(AGGREGATORS)}; trimmed_mean:SHARE, krum:SHARE, multi_krum:SHARE, norm_bound:NORM.",
)
_ATTACK = flags.DEFINE_string(
    "attack", "none", f"One of {', '.join(ATTACKS)}; sign_flip:FACTOR, scale:FACTOR, alie:Z, ipm:EPSILON, noise:STD."
)
_ATTACK_SHARE = flags.DEFINE_float("attack_fraction", 0.2, "Share of the clients that attack.")
_INCENTIVE = flags.DEFINE_string(
    "incentive",
    "none",
    f"none or one of {', '.join(INCENTIVES)}: clients are taken on and paid for their joules in each round over a "
    "--network: auction:BUDGET (USD a round, never exceeded), contract or contract:BUDGET, stackelberg or "
    "stackelberg:BUDGET (on average), posted:BUDGET (the same price for all, drawn at random).",
)
_ENERGY = flags.DEFINE_float("energy_usd_per_kwh", 0.30, "What a client's energy costs it, with an --incentive.")
_CONTRIBUTION = flags.DEFINE_string(
    "contribution",
    "none",
    f"none or one of {', '.join(CONTRIBUTIONS)}: what each client did for the model's held-out loss, from the updates "
    "it sent: gtg:TOLERANCE (Shapley values), leave_one_out, comfedsv:PERMUTATIONS (all clients in the first round).",
)
_SELECTION = flags.DEFINE_string("selection", "uniform", f"Who takes part: {', '.join(SELECTIONS)}.")
_WEIGHTING = flags.DEFINE_string(
    "weighting", None, "A client counts by its examples, or uniform; default: what the method needs."
)
_PRIVACY = flags.DEFINE_list(
    "privacy", [], f"Any of {', '.join(PRIVACIES)}: clients' differential privacy, examples', secure aggregation."
)
_DP_CLIP = flags.DEFINE_float("dp_clip", 1.0, "L2 norm of an update (dp) or of an example's gradient (dp_sgd).")
_DP_NOISE = flags.DEFINE_float("dp_noise", None, "Noise multiplier.")
_DP_EPSILON = flags.DEFINE_float("dp_epsilon", None, "Target epsilon: the noise multiplier is calibrated to it.")
_DP_DELTA = flags.DEFINE_float("dp_delta", 1e-5, "Delta of the guarantee.")
_DP_QUANTILE = flags.DEFINE_float("dp_quantile", None, "dp: the clip follows this quantile of the clients' norms.")
_DP_CAP = flags.DEFINE_float(
    "dp_cap", None, "dp: a client of n examples weighs min(n, cap) / cap; default: all weigh 1."
)
_RANKS = flags.DEFINE_list(
    "lora_ranks", [], "LoRA ranks dealt to the clients in turn, for flora, flexlora and hetlora."
)
_BUFFER = flags.DEFINE_integer(
    "buffer_size", None, "FedBuff's K; default: half of the cohort, which is its concurrency."
)
_SECURE_CLIP = flags.DEFINE_float("secure_clip", 1.0, "secure: values of an update beyond it saturate.")
_SECURE_BITS = flags.DEFINE_integer(
    "secure_bits", 24, "secure: bits of a value before masking; below 16 they are drawn at random (quantized updates)."
)
_BIAS = flags.DEFINE_bool(
    "aggregation_bias", False, "Measure how far the aggregated LoRA product is from the mean product."
)


def server_from_flags() -> ServerConfig:
    """The server optimizer. Raises ValueError where --algorithm and --server_optimizer both name one."""
    optimizer, momentum = _SERVER.value, _MOMENTUM.value
    if _ALGORITHM.value in (*_OPTIMIZERS, "fedavgm"):
        if _SERVER.present and optimizer != _ALGORITHM.value:
            raise ValueError(
                f"--algorithm={_ALGORITHM.value} is itself a server optimizer: leave out --server_optimizer"
            )
        optimizer = "sgd" if _ALGORITHM.value == "fedavgm" else _ALGORITHM.value
        momentum = 0.9 if momentum is None and optimizer == "sgd" else momentum
    rate = _SERVER_LR.value
    if rate is None:
        rate = 1.0 if optimizer == "sgd" else 0.01
    return ServerConfig(optimizer=optimizer, learning_rate=rate, momentum=momentum or 0.0)


def federation_from_flags() -> FederationConfig:
    """The federation, checked."""
    selection = "poisson" if "dp" in _PRIVACY.value and not _SELECTION.present else _SELECTION.value
    if _ENERGY.present and _INCENTIVE.value == "none":
        raise ValueError("--energy_usd_per_kwh belongs to --incentive")
    for flag in (_SECURE_CLIP, _SECURE_BITS):
        if flag.present and "secure" not in _PRIVACY.value:
            raise ValueError(f"--{flag.name} belongs to --privacy=secure")
    needs_dp = any(name in ("dp", "dp_sgd") for name in _PRIVACY.value)
    given = [flag for flag in (_DP_CLIP, _DP_NOISE, _DP_EPSILON, _DP_DELTA, _DP_QUANTILE, _DP_CAP) if flag.present]
    if given and not needs_dp:
        raise ValueError(f"--{given[0].name} belongs to --privacy=dp or --privacy=dp_sgd")
    dp = None
    if needs_dp:
        if (_DP_NOISE.value is None) == (_DP_EPSILON.value is None):
            raise ValueError("--privacy=dp and dp_sgd need either --dp_noise or --dp_epsilon")
        dp = DpConfig(
            clip=_DP_CLIP.value,
            noise_multiplier=_DP_NOISE.value,
            target_epsilon=_DP_EPSILON.value,
            delta=_DP_DELTA.value,
            adaptive_quantile=_DP_QUANTILE.value,
            cap=_DP_CAP.value,
        )
    return FederationConfig(
        algorithm=_algorithm(),
        personalization=_method_or_none(_PERSONALIZATION, PERSONALIZATIONS),
        privacy=tuple(_PRIVACY.value),
        dp=dp,
        aggregator=_method(_AGGREGATOR, AGGREGATORS),
        attack=_method(_ATTACK, ATTACKS),
        attack_fraction=_ATTACK_SHARE.value,
        selection=parse_method("selection", selection, SELECTIONS),
        uplink=_method(_UPLINK, CODECS),
        weighting=_WEIGHTING.value,
        client_optimizer=_CLIENT.value,
        lora_ranks=tuple(_whole("lora_ranks", _RANKS.value)),
        aggregation_bias=_BIAS.value,
        secure_clip=_SECURE_CLIP.value,
        secure_bits=_SECURE_BITS.value,
        incentive=_method_or_none(_INCENTIVE, INCENTIVES),
        energy_usd_per_kwh=_ENERGY.value,
        contribution=_method_or_none(_CONTRIBUTION, CONTRIBUTIONS),
    )


def _algorithm():
    """The algorithm with the numbers that flags of their own have."""
    spec = _ALGORITHM.value
    if spec in (*_OPTIMIZERS, "fedavgm"):
        spec = "fedavg"
    if _PROXIMAL.present and spec != "fedprox":
        raise ValueError("--proximal belongs to --algorithm=fedprox")
    if spec == "fedprox":
        spec = f"fedprox:{_PROXIMAL.value}"
    algorithm = parse_method("algorithm", spec, ALGORITHMS)
    if _BUFFER.value is None:
        return algorithm
    if not isinstance(algorithm, FedBuff):
        raise ValueError(f"--buffer_size belongs to --algorithm=fedbuff, got {spec}")
    return FedBuff(buffer_size=_BUFFER.value)


def _method(flag, registry):
    return parse_method(flag.name, flag.value, registry)


def _method_or_none(flag, registry):
    return None if flag.value == "none" else _method(flag, registry)


def _whole(name: str, values: list[str]) -> list[int]:
    if any(not v.isdecimal() or int(v) < 1 for v in values):
        raise ValueError(f"--{name}={','.join(values)}: expected whole numbers above 0")
    return [int(v) for v in values]
