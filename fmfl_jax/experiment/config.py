"""What an experiment is made of: text, partition, tunings, server, air, as checked frozen dataclasses."""

import dataclasses

import optax

from fmfl_jax.config import LlamaConfig
from fmfl_jax.experiment.air import AGGREGATIONS
from fmfl_jax.experiment.federation_config import FACTORED, LORA_ALGORITHMS, FederationConfig, split_spec
from fmfl_jax.experiment.pretrain import PretrainConfig
from fmfl_jax.experiment.rounds import RoundsConfig
from fmfl_jax.fed import server_optimizers
from fmfl_jax.fed import uplink as uplinks
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.split import FullConfig, PeftConfig, check_context
from fmfl_jax.quant.awq import QuantConfig
from fmfl_jax.wireless.network import Network
from fmfl_jax.wireless.presets import PRESETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Where text comes from. train and eval are files or folders; both None: the text that ships with CPython, one half
    for pre-training, the other for the clients, a tenth of it held out. calib: AWQ's calibration text, None is train's.

    max_eval_windows bounds the evaluation text (None: all of it).
    """

    train: str | None = None
    eval: str | None = None
    calib: str | None = None
    seq_len: int = 128
    max_eval_windows: int | None = None
    calib_windows: int = 128

    def __post_init__(self):
        if (self.train is None) != (self.eval is None):
            raise ValueError("train_text and eval_text must be given together")
        for name in ("seq_len", "calib_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartitionConfig:
    """How the training windows are dealt: "random" (the paper's), "dirichlet" over documents with concentration alpha,
    "document" (whole documents), or "quantity" (log-normal sizes with `skew`)."""

    kind: str = "random"
    num_clients: int = 20
    alpha: float = 0.5
    skew: float = 1.0

    def __post_init__(self):
        if self.kind not in ("random", "dirichlet", "document", "quantity"):
            raise ValueError(f"partition must be random, dirichlet, document or quantity, got {self.kind!r}")
        if self.num_clients < 1:
            raise ValueError(f"num_clients must be at least 1, got {self.num_clients}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """One way of tuning and the learning rate of the clients' AdamW."""

    peft: PeftConfig
    learning_rate: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """optimizer of the pseudo-gradient: "sgd" (with learning rate 1 and momentum 0: FedAvg; with momentum: FedAvgM),
    "adam", "yogi" and "adagrad" of optax, or "fedadam", "fedyogi" and "fedadagrad" of Reddi et al., Algorithm 2."""

    optimizer: str = "sgd"
    learning_rate: float = 1.0
    momentum: float = 0.0

    def __post_init__(self):
        if self.optimizer not in ("sgd", *_SERVER_OPTIMIZERS):
            raise ValueError(f"--server_optimizer={self.optimizer}: expected sgd, {', '.join(_SERVER_OPTIMIZERS)}")
        if self.optimizer != "sgd" and self.momentum:
            raise ValueError(f"server momentum belongs to sgd, got optimizer {self.optimizer!r}")
        if self.learning_rate <= 0 or not 0 <= self.momentum < 1:
            raise ValueError("the server needs a learning rate above 0 and a momentum in [0, 1)")

    def make(self) -> optax.GradientTransformation:
        """The optax transformation."""
        if self.optimizer == "sgd":
            return optax.sgd(self.learning_rate, self.momentum or None)
        return _SERVER_OPTIMIZERS[self.optimizer](self.learning_rate)

    @property
    def is_plain(self) -> bool:
        """Whether the server takes the mean as it is."""
        return (self.optimizer, self.learning_rate, self.momentum) == ("sgd", 1.0, 0.0)


_SERVER_OPTIMIZERS = {
    "adam": optax.adam,
    "yogi": optax.yogi,
    "adagrad": optax.adagrad,
    "fedadam": server_optimizers.fed_adam,
    "fedyogi": server_optimizers.fed_yogi,
    "fedadagrad": server_optimizers.fed_adagrad,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AirConfig:
    """The network that rounds go over: a preset of fmfl_jax/wireless/presets.py by name, with the run's number of
    clients and, unless None, its own deadline. devices: names of device classes, dealt to the clients in turn.
    aggregation: how what arrives is joined, one of AGGREGATIONS (experiment/air.py)."""

    network: str
    deadline_s: float | None = None
    devices: tuple[str, ...] = ("phone",)
    aggregation: str = "survivors"

    def __post_init__(self):
        if self.network not in PRESETS:
            raise ValueError(f"--network={self.network}: expected none or one of {', '.join(PRESETS)}")
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"--aggregation={self.aggregation}: expected one of {', '.join(AGGREGATIONS)}")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ValueError(f"deadline_s must be above 0, got {self.deadline_s}")

    def make_network(self, num_clients: int) -> Network:
        """The Network of num_clients clients."""
        own = {} if self.deadline_s is None else {"deadline_s": self.deadline_s}
        return PRESETS[self.network](num_clients=num_clients, **own)


def make_uplink(spec: str | None) -> uplinks.Uplink | None:
    """The transform that `spec` names; None or "identity" sends updates as they are.

    qsgd:LEVELS, rounding:BITS (stochastic rounding), topk:FRACTION, lowrank:RANK; all but qsgd with error feedback.
    Raises ValueError for anything else.
    """
    if spec is None or spec == "identity":
        return None
    name, _, argument = spec.partition(":")
    kinds = {
        "qsgd": (uplinks.qsgd, int),
        "rounding": (uplinks.stochastic_rounding, int),
        "topk": (uplinks.top_k, float),
        "lowrank": (uplinks.low_rank, int),
    }
    try:
        make, number = kinds[name]
        value = number(argument)
    except (KeyError, ValueError):
        raise ValueError(
            f"--uplink={spec}: expected identity, qsgd:LEVELS, rounding:BITS, topk:FRACTION or lowrank:RANK"
        ) from None
    return make(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaseStudyConfig:
    """Everything a case study depends on. checkpoint None: `model` is pre-trained as `pretrain` says.

    tunings: name -> Tuning. weights: "fp", "awq" or "rtn" (4-bit round-to-nearest, the baseline of AWQ). air None: no
    network. uplink: see `make_uplink`. random_init: `model` is taken untrained, to measure costs at sizes of which no
    checkpoint is at hand. remat: each block is computed again in the backward pass, which bounds the memory.
    dequantize: a checkpoint's 4-bit weights are unpacked to dtype before `weights` is looked at.
    """

    checkpoint: str | None
    tokenizer: str | None
    model: LlamaConfig | None
    pretrain: PretrainConfig
    dtype: str
    text: TextConfig
    partition: PartitionConfig
    rounds: RoundsConfig
    server: ServerConfig
    quant: QuantConfig
    tunings: dict[str, Tuning]
    weights: tuple[str, ...]
    federation: FederationConfig = FederationConfig()
    air: AirConfig | None = None
    uplink: str | None = None
    random_init: bool = False
    remat: bool = False
    dequantize: bool = False

    def __post_init__(self):
        make_uplink(self.uplink)
        unknown = [w for w in self.weights if w not in ("fp", "awq", "rtn")]
        if unknown or not self.weights:
            raise ValueError(f"weights must be among fp, awq, rtn, got {','.join(self.weights)!r}")
        if not self.tunings:
            raise ValueError("the case study needs at least one peft method")
        if (self.checkpoint is None) == (self.model is None):
            raise ValueError("give either a checkpoint or a model to pre-train")
        if self.random_init and self.checkpoint is not None:
            raise ValueError("random_init takes a model without a checkpoint")
        if self.rounds.cohort_size > self.partition.num_clients:
            raise ValueError(f"cohort_size {self.rounds.cohort_size} exceeds the {self.partition.num_clients} clients")
        if any(isinstance(t.peft, FullConfig) for t in self.tunings.values()) and self.weights != ("fp",):
            raise ValueError("full fine-tuning needs weights=fp: 4-bit weights have no gradient")
        if self.model is not None:
            check_contexts(self, self.model)
        for reason in federation_refusals(self):
            raise ValueError(reason)


def check_contexts(c: CaseStudyConfig, model: LlamaConfig) -> None:
    """Raises ValueError where the windows of a tuning, with its virtual tokens, exceed the model's context."""
    for tuning in c.tunings.values():
        check_context(model, tuning.peft, c.text.seq_len)


def federation_refusals(c: CaseStudyConfig):
    """Why this federation cannot tune this model over this air; nothing where it can."""
    fed = c.federation
    personal, _ = split_spec(fed.personalization)
    lora = all(isinstance(tuning.peft, LoraConfig) for tuning in c.tunings.values())
    if (fed.algorithm in LORA_ALGORITHMS or personal == "private_lora") and not lora:
        yield f"--algorithm={fed.algorithm} --personalization={fed.personalization} needs --peft=lora"
    if fed.algorithm == "flora" and c.weights != ("fp",):
        yield (
            "--algorithm=flora adds every round's product to the base, which 4 bits cannot hold: it needs --weights=fp; "
            "flexlora aggregates as exactly beside a 4-bit base"
        )
    if fed.algorithm in FACTORED and not c.server.is_plain:
        yield (
            f"--algorithm={fed.algorithm} with --server_optimizer={c.server.optimizer}: its update is a product of "
            "factors, which has no coordinates that an optimizer could keep moments of"
        )
    if fed.algorithm in FACTORED and c.uplink is not None:
        yield f"--uplink={c.uplink} with --algorithm={fed.algorithm}: the server multiplies its factors, it averages none"
    if c.air is not None and c.air.aggregation != "survivors":
        what = f"--aggregation={c.air.aggregation}"
        if fed.privacy and "dp_sgd" not in fed.privacy:
            yield f"{what} with --privacy={','.join(fed.privacy)}: it needs the plain sum of those who are heard"
        if fed.aggregator != "mean" or fed.algorithm in (*FACTORED, "fedbuff", "scaffold"):
            yield (
                f"{what} with --algorithm={fed.algorithm} --aggregator={fed.aggregator}: it is itself how messages are "
                "joined"
            )
        if c.air.aggregation.startswith("over_the_air") and c.uplink is not None:
            yield f"{what} with --uplink={c.uplink}: analog symbols are sent as they are"
    if fed.selection == "deadline" and (c.air is None or c.air.deadline_s is None):
        yield "--selection=deadline needs a --network and a --deadline_s"
