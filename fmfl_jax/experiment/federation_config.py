"""What a federation is made of, one checked dataclass; combinations that make no sense are refused with the reason."""

import dataclasses

from fmfl_jax.finite import finite_fields, finite_float

LORA_ALGORITHMS = ("fedit", "ffa_lora", "fedsa_lora", "flora", "flexlora", "hetlora")
FACTORED = ("flora", "flexlora", "hetlora")  # the server needs every client's factors
ALGORITHMS = ("fedavg", "fedprox", "scaffold", "fedbuff", *LORA_ALGORITHMS)
PERSONALIZATIONS = ("none", "ditto", "apfl", "fedper", "fedrep", "private_lora")
AGGREGATORS = ("mean", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median", "norm_bound", "fltrust")
ATTACKS = ("none", "sign_flip", "scale", "alie", "ipm", "noise", "label_flip")
SELECTIONS = ("uniform", "poisson", "oort", "deadline")
PRIVACIES = ("dp", "dp_sgd", "secure")


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class DpConfig:
    """Differential privacy. noise_multiplier: standard deviation of the noise over the sensitivity; None: what reaches
    target_epsilon at delta after all rounds. clip: L2 norm that a client's update ("dp") or an example's gradient
    ("dp_sgd") is cut to. adaptive_quantile: the clipping norm follows this quantile of the clients' norms; None: fixed.
    cap: of "dp", a client of n examples weighs min(n, cap) / cap; None: all weigh 1.
    """

    clip: float = 1.0
    noise_multiplier: float | None = None
    target_epsilon: float | None = None
    delta: float = 1e-5
    adaptive_quantile: float | None = None
    cap: float | None = None

    def __post_init__(self):
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError("privacy needs either a noise multiplier or a target epsilon")
        if not self.clip > 0 or not 0 < self.delta < 1:
            raise ValueError(f"privacy needs a clip above 0 and a delta in (0, 1), got {self.clip} and {self.delta}")
        if self.noise_multiplier is not None and not self.noise_multiplier >= 0:
            raise ValueError(f"the noise multiplier must be 0 or more, got {self.noise_multiplier}")
        if self.target_epsilon is not None and not self.target_epsilon > 0:
            raise ValueError(f"the target epsilon must be above 0, got {self.target_epsilon}")
        if self.adaptive_quantile is not None and not 0 < self.adaptive_quantile < 1:
            raise ValueError(f"the quantile of adaptive clipping must be in (0, 1), got {self.adaptive_quantile}")
        if self.cap is not None and not self.cap > 0:
            raise ValueError(f"the cap on a client's examples must be above 0, got {self.cap}")


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class FederationConfig:
    """The names are those above; a number after a colon is the method's own: "ditto:0.1", "trimmed_mean:0.2",
    "krum:0.3".

    proximal: FedProx's mu. personalization: its number is the degree (lambda, alpha, number of private layers, private
    rank). privacy: any of "dp", "dp_sgd", "secure". aggregator, attack: their number is the fraction, factor or norm.
    attack_fraction: share of the clients that attack. weighting: "examples" or "uniform"; None: what the method needs.
    client_optimizer: "adamw" or "sgd"; None: adamw, but sgd for SCAFFOLD. ranks: LoRA ranks dealt to the clients in
    turn, for the algorithms that take different ones; () gives everybody the run's own. secure_clip, secure_bits: fixed
    point of secure aggregation: values beyond the clip saturate, fewer bits are quantized updates. buffer_size:
    FedBuff's K, the cohort being its concurrency; None: half of it.
    """

    algorithm: str = "fedavg"
    proximal: float = 0.0
    personalization: str = "none"
    privacy: tuple[str, ...] = ()
    dp: DpConfig | None = None
    aggregator: str = "mean"
    attack: str = "none"
    attack_fraction: float = 0.2
    selection: str = "uniform"
    weighting: str | None = None
    client_optimizer: str | None = None
    ranks: tuple[int, ...] = ()
    buffer_size: int | None = None
    aggregation_bias: bool = False
    secure_clip: float = 1.0
    secure_bits: int = 24

    def __post_init__(self):
        kinds = {
            "algorithm": ALGORITHMS,
            "personalization": PERSONALIZATIONS,
            "aggregator": AGGREGATORS,
            "attack": ATTACKS,
            "selection": SELECTIONS,
        }
        for field, known in kinds.items():
            _check_name(field, split_spec(getattr(self, field))[0], known)
        for name in self.privacy:
            _check_name("privacy", name, PRIVACIES)
        if self.weighting not in (None, "examples", "uniform"):
            raise ValueError(f"--weighting={self.weighting}: expected examples or uniform")
        if self.client_optimizer not in (None, "adamw", "sgd"):
            raise ValueError(f"--client_optimizer={self.client_optimizer}: expected adamw or sgd")
        if not self.secure_clip > 0 or not 2 <= self.secure_bits <= 24:
            raise ValueError(
                f"secure aggregation takes a clip above 0 and 2 to 24 bits, got {self.secure_clip} and "
                f"{self.secure_bits}"
            )
        if not 0 <= self.attack_fraction < 1:
            raise ValueError(f"--attack_fraction={self.attack_fraction}: expected a share in [0, 1)")
        if self.proximal < 0 or (self.algorithm == "fedprox") != (self.proximal > 0):
            raise ValueError("--algorithm=fedprox takes a --proximal above 0, and no other algorithm takes one")
        for reason in refusals(self):
            raise ValueError(reason)

    @property
    def uniform_weights(self) -> bool:
        """Whether every client counts 1: asked for, or what the method's definition needs."""
        return self.weighting == "uniform" or "dp" in self.privacy or self.algorithm in ("scaffold", "fedbuff")


def split_spec(spec: str) -> tuple[str, str | None]:
    """ "name:number" -> (name, number), "name" -> (name, None)."""
    name, colon, number = spec.partition(":")
    return name, number if colon else None


def number_of(flag: str, spec: str, default: float | None = None) -> float:
    """The number of "name:number". Raises ValueError, naming the flag, where there is none and no default."""
    name, number = split_spec(spec)
    if number is None and default is not None:
        return default
    try:
        return finite_float(number)
    except (TypeError, ValueError):
        raise ValueError(f"--{flag}={spec}: expected {name}:NUMBER, a finite one") from None


def refusals(c: FederationConfig):
    """Why the parts of this configuration cannot stand together; nothing where they can."""
    personal, aggregator, attack = (split_spec(s)[0] for s in (c.personalization, c.aggregator, c.attack))
    dp, secure = "dp" in c.privacy, "secure" in c.privacy
    if secure and aggregator != "mean":
        yield f"secure aggregation with --aggregator={c.aggregator}: the server sees only the sum, no client's own update"
    if secure and c.algorithm in FACTORED:
        yield (
            f"secure aggregation with --algorithm={c.algorithm}: its server needs each client's factors, and secure "
            "aggregation shows it only a sum"
        )
    if secure and c.algorithm == "fedbuff":
        yield "secure aggregation with --algorithm=fedbuff: masks cancel within one cohort, a buffer mixes several"
    if dp and c.weighting == "examples":
        yield (
            "--privacy=dp with --weighting=examples: one client's share of the mean, and so the sensitivity, would grow "
            "with its data; differential privacy needs uniform weights"
        )
    if dp and c.selection != "poisson":
        yield f"--privacy=dp with --selection={c.selection}: the accounting holds for Poisson sampling, blind to the data"
    if dp and aggregator != "mean":
        yield f"--privacy=dp with --aggregator={c.aggregator}: the noise is calibrated to the sensitivity of a mean"
    if dp and c.algorithm in ("scaffold", "fedbuff", *FACTORED):
        yield (
            f"--privacy=dp with --algorithm={c.algorithm}: its message is more than one clipped update of this round's "
            "Poisson cohort, which the accounting does not cover"
        )
    if ("dp" in c.privacy or "dp_sgd" in c.privacy) != (c.dp is not None):
        yield "the flags of differential privacy belong to --privacy=dp or --privacy=dp_sgd, and these need them"
    if dp and "dp_sgd" in c.privacy:
        yield "--privacy=dp protects clients and --privacy=dp_sgd examples: choose one, the noise would be added twice"
    if "dp_sgd" in c.privacy and c.dp is not None and c.dp.adaptive_quantile is not None:
        yield "adaptive clipping belongs to --privacy=dp: --privacy=dp_sgd clips examples at a fixed norm"
    if "dp_sgd" in c.privacy and c.dp is not None and c.dp.cap is not None:
        yield "--dp_cap belongs to --privacy=dp: --privacy=dp_sgd bounds what an example does, not a client"
    if c.dp is not None and c.dp.cap is not None and c.weighting == "uniform":
        yield "--dp_cap with --weighting=uniform: the cap is on weights by the number of examples"
    if c.algorithm == "scaffold" and c.client_optimizer == "adamw":
        yield "--algorithm=scaffold with --client_optimizer=adamw: its control variates assume plain SGD steps"
    if c.algorithm in ("scaffold", "fedbuff", *FACTORED) and aggregator != "mean":
        yield f"--aggregator={c.aggregator} with --algorithm={c.algorithm}: it is defined by its own aggregation"
    if c.algorithm in FACTORED and attack not in ("none", "label_flip"):
        yield (
            f"--attack={c.attack} with --algorithm={c.algorithm}: attacks are defined on updates; a flipped A and a "
            "flipped B cancel"
        )
    if personal != "none" and c.algorithm not in ("fedavg", "fedprox", "fedit", "ffa_lora"):
        yield f"--personalization={c.personalization} goes with fedavg, fedprox, fedit or ffa_lora, not {c.algorithm}"
    if personal == "private_lora" and c.algorithm == "ffa_lora":
        yield (
            "--personalization=private_lora with --algorithm=ffa_lora: the private half would have a frozen A that "
            "nobody shares"
        )
    if personal in ("fedper", "fedrep", "private_lora") and c.algorithm == "fedprox":
        yield f"--personalization={c.personalization} with fedprox: the proximal term would pull at private parameters too"
    if aggregator == "fltrust" and (personal != "none" or c.algorithm == "fedsa_lora"):
        yield "--aggregator=fltrust with personalization: the server's reference has no private state"
    if aggregator == "fltrust" and "dp_sgd" in c.privacy:
        yield "--aggregator=fltrust with --privacy=dp_sgd: the server's own data would get the clients' noise"
    if c.ranks and c.algorithm not in FACTORED:
        yield (
            f"--lora_ranks needs --algorithm={', '.join(FACTORED)}: {c.algorithm} cannot average factors of "
            "different ranks"
        )
    if c.buffer_size is not None and c.algorithm != "fedbuff":
        yield f"--buffer_size belongs to --algorithm=fedbuff, got {c.algorithm}"
    if c.algorithm == "fedbuff" and c.selection != "uniform":
        yield f"--algorithm=fedbuff with --selection={c.selection}: clients start as others finish, there are no cohorts"
    if c.aggregation_bias and c.algorithm != "fedit":
        yield (
            "--aggregation_bias goes with --algorithm=fedit: flexlora and hetlora always report theirs, ffa_lora and "
            f"flora have none, {c.algorithm} averages no LoRA products"
        )
    if c.aggregation_bias and secure:
        yield "--aggregation_bias with secure aggregation: it compares single clients' factors, which the server never sees"


def _check_name(field: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"--{field}={name}: expected one of {', '.join(known)}")
