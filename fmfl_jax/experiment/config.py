"""What an experiment is made of: text, partition, tunings, server, air, as checked frozen dataclasses."""

import dataclasses

import optax

from fmfl_jax.config import LlamaConfig
from fmfl_jax.experiment.pretrain import PretrainConfig
from fmfl_jax.experiment.rounds import RoundsConfig
from fmfl_jax.fed import uplink as uplinks
from fmfl_jax.peft.split import FullConfig, PeftConfig
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
    """optimizer: "sgd" (with learning rate 1 and momentum 0: FedAvg), "adam", "yogi" or "adagrad" on the
    pseudo-gradient. proximal: FedProx's mu."""

    optimizer: str = "sgd"
    learning_rate: float = 1.0
    momentum: float = 0.0
    proximal: float = 0.0

    def __post_init__(self):
        if self.optimizer not in ("sgd", "adam", "yogi", "adagrad"):
            raise ValueError(f"server optimizer must be sgd, adam, yogi or adagrad, got {self.optimizer!r}")
        if self.optimizer != "sgd" and self.momentum:
            raise ValueError(f"server momentum belongs to sgd, got optimizer {self.optimizer!r}")
        if self.learning_rate <= 0 or self.proximal < 0 or not 0 <= self.momentum < 1:
            raise ValueError("the server needs a learning rate above 0, momentum in [0, 1) and proximal of 0 or more")

    def make(self) -> optax.GradientTransformation:
        """The optax transformation."""
        if self.optimizer == "sgd":
            return optax.sgd(self.learning_rate, self.momentum or None)
        return {"adam": optax.adam, "yogi": optax.yogi, "adagrad": optax.adagrad}[self.optimizer](self.learning_rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AirConfig:
    """The network that rounds go over: a preset of fmfl_jax/wireless/presets.py by name, with the run's number of clients
    and, unless None, its own deadline. devices: names of device classes, dealt to the clients in turn. unbiased:
    inverse-probability weights."""

    network: str
    deadline_s: float | None = None
    devices: tuple[str, ...] = ("phone",)
    unbiased: bool = False

    def __post_init__(self):
        if self.network not in PRESETS:
            raise ValueError(f"--network={self.network}: expected none or one of {', '.join(PRESETS)}")
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
    kinds = {"qsgd": (uplinks.qsgd, int), "rounding": (uplinks.stochastic_rounding, int),
             "topk": (uplinks.top_k, float), "lowrank": (uplinks.low_rank, int)}
    try:
        make, number = kinds[name]
        value = number(argument)
    except (KeyError, ValueError):
        raise ValueError(f"--uplink={spec}: expected identity, qsgd:LEVELS, rounding:BITS, topk:FRACTION or "
                         "lowrank:RANK") from None
    return make(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaseStudyConfig:
    """Everything a case study depends on. checkpoint None: `model` is pre-trained as `pretrain` says.

    tunings: name -> Tuning. weights: "fp", "awq" or "rtn" (4-bit round-to-nearest, the baseline of AWQ). air None: no
    network. uplink: see `make_uplink`. random_init: `model` is taken untrained, to measure costs at sizes of which no
    checkpoint is at hand. remat: each block is computed again in the backward pass, which bounds the memory.
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
    air: AirConfig | None = None
    uplink: str | None = None
    random_init: bool = False
    remat: bool = False

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
