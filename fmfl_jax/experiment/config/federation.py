"""What a federation is made of, one checked dataclass; combinations that make no sense are refused with the reason."""

import dataclasses
from collections.abc import Iterator

from fmfl_jax.experiment.config.server import ServerConfig
from fmfl_jax.experiment.methods.aggregators import AGGREGATORS, AggregatorMethod, FLTrust, Mean
from fmfl_jax.experiment.methods.algorithms import ALGORITHMS, AlgorithmMethod, FedAvg, FedIt, FedProx
from fmfl_jax.experiment.methods.attacks import ATTACKS, AttackMethod, LabelFlip, NoAttack
from fmfl_jax.experiment.methods.codecs import CODECS, CodecMethod, Identity
from fmfl_jax.experiment.methods.contributions import CONTRIBUTIONS, ComFedSV, ContributionMethod
from fmfl_jax.experiment.methods.incentives import INCENTIVES, IncentiveMethod
from fmfl_jax.experiment.methods.names import name_of
from fmfl_jax.experiment.methods.personalizations import PERSONALIZATIONS, PersonalizationMethod
from fmfl_jax.experiment.methods.selections import SELECTIONS, Poisson, SelectionMethod, Uniform
from fmfl_jax.finite import finite_fields

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
    """The methods are those of experiment/methods.

    personalization: takes the place of the algorithm's client; None: all clients share one model. privacy: any of "dp",
    "dp_sgd", "secure". attack_fraction: share of the clients that attack. weighting: "examples" or "uniform"; None:
    what the method needs. client_optimizer: "adamw" or "sgd"; None: the model's own (adamw for language models, sgd for
    small ones), but sgd where the method needs it.
    lora_ranks: LoRA ranks dealt to the clients in turn, for the algorithms that take different ones; () gives everybody
    that of the run. secure_clip, secure_bits: fixed point of secure aggregation: values beyond the clip saturate, fewer
    bits are quantized updates. aggregation_bias: measure how far the aggregated LoRA product is from the mean product.
    incentive: takes clients on and pays them in place of the selection; None: clients work for nothing.
    energy_usd_per_kwh: what clients' joules cost them. contribution: how it is measured what each client did; None: it
    is not.
    """

    algorithm: AlgorithmMethod = FedAvg()
    personalization: PersonalizationMethod | None = None
    privacy: tuple[str, ...] = ()
    dp: DpConfig | None = None
    aggregator: AggregatorMethod = Mean()
    attack: AttackMethod = NoAttack()
    attack_fraction: float = 0.2
    selection: SelectionMethod = Uniform()
    uplink: CodecMethod = Identity()
    weighting: str | None = None
    client_optimizer: str | None = None
    lora_ranks: tuple[int, ...] = ()
    aggregation_bias: bool = False
    secure_clip: float = 1.0
    secure_bits: int = 24
    incentive: IncentiveMethod | None = None
    energy_usd_per_kwh: float = 0.30
    contribution: ContributionMethod | None = None

    def __post_init__(self):
        for name in self.privacy:
            if name not in PRIVACIES:
                raise ValueError(f"privacy={name}: expected some of {', '.join(PRIVACIES)}")
        if self.weighting not in (None, "examples", "uniform"):
            raise ValueError(f"weighting={self.weighting}: expected examples or uniform")
        if self.client_optimizer not in (None, "adamw", "sgd"):
            raise ValueError(f"client_optimizer={self.client_optimizer}: expected adamw or sgd")
        if not self.secure_clip > 0 or not 2 <= self.secure_bits <= 24:
            raise ValueError(
                f"secure aggregation takes a clip above 0 and 2 to 24 bits, got {self.secure_clip} and "
                f"{self.secure_bits}"
            )
        if not 0 <= self.attack_fraction < 1:
            raise ValueError(f"attack_fraction={self.attack_fraction}: expected a share in [0, 1)")
        if not self.energy_usd_per_kwh > 0:
            raise ValueError(f"energy_usd_per_kwh={self.energy_usd_per_kwh}: expected a price above 0")
        for reason in refusals(self):
            raise ValueError(reason)

    @property
    def uniform_weights(self) -> bool:
        """Whether every client counts 1: asked for, or what the method's definition needs."""
        return self.weighting == "uniform" or "dp" in self.privacy or self.algorithm.uniform_weights

    @property
    def keeps_personal_models(self) -> bool:
        """Whether clients have personal models, on which they are evaluated."""
        return self.personalization is not None or self.algorithm.keeps_personal_model

    @property
    def proximal(self) -> float:
        """FedProx's mu, 0 for none."""
        return self.algorithm.proximal if isinstance(self.algorithm, FedProx) else 0.0


def refusals(c: FederationConfig) -> Iterator[str]:
    """Why the parts of this configuration cannot stand together; nothing where they can. Fields stand as name=value."""
    algorithm = f"algorithm={name_of(c.algorithm, ALGORITHMS)}"
    aggregator = f"aggregator={name_of(c.aggregator, AGGREGATORS)}"
    selection = f"selection={name_of(c.selection, SELECTIONS)}"
    yield from _privacy_refusals(c, algorithm, aggregator, selection)
    if c.algorithm.sgd_only and c.client_optimizer == "adamw":
        yield f"{algorithm} with client_optimizer=adamw: its control variates assume plain SGD steps"
    if c.algorithm.own_aggregation and c.aggregator != Mean():
        yield f"{aggregator} with {algorithm}: the algorithm defines how updates are joined"
    if c.algorithm.factored and not isinstance(c.attack, NoAttack | LabelFlip):
        yield (
            f"attack={name_of(c.attack, ATTACKS)} with {algorithm}: attacks are defined on updates; a flipped A and a "
            "flipped B cancel"
        )
    if c.algorithm.factored and c.uplink != Identity():
        uplink = name_of(c.uplink, CODECS)
        yield f"uplink={uplink} with {algorithm}: the server multiplies its factors, it averages none"
    if c.lora_ranks and not c.algorithm.factored:
        factored = ", ".join(name for name, made in ALGORITHMS.items() if made.factored)
        yield f"lora_ranks needs algorithm={factored}: factors of different ranks cannot be averaged by {algorithm}"
    if c.algorithm.asynchronous and c.selection != Uniform():
        yield f"{algorithm} with {selection}: clients start as others finish, there are no cohorts"
    if c.aggregation_bias and not isinstance(c.algorithm, FedIt):
        yield (
            "aggregation_bias goes with algorithm=fedit: flexlora and hetlora always report theirs, ffa_lora and flora "
            f"have none, {algorithm} averages no LoRA products"
        )
    if c.personalization is not None:
        yield from _personalization_refusals(c, algorithm)
    if isinstance(c.aggregator, FLTrust) and c.keeps_personal_models:
        yield "aggregator=fltrust with personalization: the server's reference has no client's state"
    if c.incentive is not None:
        yield from _incentive_refusals(c, algorithm, selection)
    if c.contribution is not None:
        yield from _contribution_refusals(c, algorithm, aggregator)


def _incentive_refusals(c: FederationConfig, algorithm: str, selection: str) -> Iterator[str]:
    incentive = f"incentive={name_of(c.incentive, INCENTIVES)}"
    if c.algorithm.asynchronous:
        yield f"{incentive} with {algorithm}: clients are taken on round by round, an asynchronous server has none"
    if "dp" in c.privacy:
        yield f"{incentive} with privacy=dp: the accounting holds for Poisson sampling, not for who asks least"
    if c.selection != Uniform():
        yield f"{incentive} with {selection}: the incentive itself says who takes part"


def _contribution_refusals(c: FederationConfig, algorithm: str, aggregator: str) -> Iterator[str]:
    contribution = f"contribution={name_of(c.contribution, CONTRIBUTIONS)}"
    if "secure" in c.privacy or "dp" in c.privacy:
        yield f"{contribution} with privacy={','.join(c.privacy)}: it looks at single updates, which stay unseen"
    if not isinstance(c.algorithm, FedAvg | FedProx):
        yield f"{contribution} with {algorithm}: coalitions' models are means of deltas, as in fedavg and fedprox"
    if c.aggregator != Mean():
        yield f"{contribution} with {aggregator}: coalitions' models are plain means"
    if c.personalization is not None:
        yield f"{contribution} with personalization: it values the shared model alone"
    if isinstance(c.contribution, ComFedSV) and c.incentive is not None:
        yield f"{contribution} with incentive: all clients take part in its first round, whom nobody has taken on"


def server_refusals(fed: FederationConfig, server: ServerConfig) -> Iterator[str]:
    """Why this federation cannot have this server's optimizer."""
    if fed.contribution is not None and not server.is_plain:
        contribution = f"contribution={name_of(fed.contribution, CONTRIBUTIONS)}"
        yield (
            f"{contribution} with server_optimizer={server.optimizer}: coalitions' models are the plain means, which "
            "another server, another rate or momentum does not make"
        )


def _privacy_refusals(c: FederationConfig, algorithm: str, aggregator: str, selection: str) -> Iterator[str]:
    dp, dp_sgd, secure = ("dp" in c.privacy, "dp_sgd" in c.privacy, "secure" in c.privacy)
    if secure and c.aggregator != Mean():
        yield f"secure aggregation with {aggregator}: the server sees only the sum, no single update"
    if secure and c.algorithm.factored:
        yield (
            f"secure aggregation with {algorithm}: its server needs each client's factors, and secure aggregation "
            "shows it only a sum"
        )
    if secure and c.algorithm.asynchronous:
        yield f"secure aggregation with {algorithm}: masks cancel within one cohort, a buffer mixes several"
    if secure and c.aggregation_bias:
        yield "aggregation_bias with secure aggregation: it compares factors of single clients, which stay unseen"
    if dp and c.weighting == "examples":
        yield (
            "privacy=dp with weighting=examples: one client's share of the mean, and so the sensitivity, would grow "
            "with its data; differential privacy needs uniform weights"
        )
    if dp and not isinstance(c.selection, Poisson):
        yield f"privacy=dp with {selection}: the accounting holds for Poisson sampling"
    if dp and c.aggregator != Mean():
        yield f"privacy=dp with {aggregator}: the noise is calibrated to the sensitivity of a mean"
    if dp and c.algorithm.own_aggregation:
        yield (
            f"privacy=dp with {algorithm}: its update is more than one clipped delta of this round's Poisson cohort, "
            "which the accounting does not cover"
        )
    if (dp or dp_sgd) != (c.dp is not None):
        yield "the numbers of differential privacy belong to privacy=dp or privacy=dp_sgd, and these need them"
    if dp and dp_sgd:
        yield "privacy=dp protects clients and privacy=dp_sgd examples: choose one, the noise would be added twice"
    if dp_sgd and isinstance(c.aggregator, FLTrust):
        yield "aggregator=fltrust with privacy=dp_sgd: the server's data would get the clients' noise"
    if c.dp is None:
        return
    if dp_sgd and c.dp.adaptive_quantile is not None:
        yield "adaptive clipping belongs to privacy=dp: privacy=dp_sgd clips examples at a fixed norm"
    if dp_sgd and c.dp.cap is not None:
        yield "dp_cap belongs to privacy=dp: privacy=dp_sgd bounds what an example does, not a client"
    if c.dp.cap is not None and c.weighting == "uniform":
        yield "dp_cap with weighting=uniform: the cap is on weights by the number of examples"


def _personalization_refusals(c: FederationConfig, algorithm: str) -> Iterator[str]:
    assert c.personalization is not None
    personalization = f"personalization={name_of(c.personalization, PERSONALIZATIONS)}"
    if not c.algorithm.personalizable:
        yield f"{personalization} goes with fedavg, fedprox, fedit or ffa_lora, not {algorithm}"
    if c.personalization.private_rank and c.algorithm.lora_view == "b_only":
        yield f"{personalization} with {algorithm}: the private half would have a frozen A that nobody shares"
    if c.proximal and not c.personalization.proximal:
        yield f"{personalization} with {algorithm}: the proximal term would pull at private parameters too"
