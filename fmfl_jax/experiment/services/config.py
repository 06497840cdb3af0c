"""What a run of the foundation model's services depends on: data, federation, teacher, placement, and the refusals."""

import dataclasses

from fmfl_jax.experiment.config.network import NetworkConfig
from fmfl_jax.finite import finite_fields
from fmfl_jax.services.checks import at_least, one_of, positive, same_length, share

SERVICES = (
    "distill",
    "generate",
    "augment",
    "ensemble",
    "reweight",
    "calibrate",
    "features",
    "silos",
    "evaluate",
    "alignment",
    "trust",
)
NEED_LOGITS = ("distill", "ensemble", "silos", "trust")  # of the FM: labels alone do not do
NEED_FEATURES = ("calibrate", "features")  # of the student
PLACEMENTS = ("cloud", "edge", "client")
STUDENTS = ("linear", "hidden")
ACCESS = ("logits", "text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full:
    """All logits in 16 bits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bits:
    """So many bits a logit, over a range of 10 nats below the largest."""

    bits: int

    def __post_init__(self):
        if not 1 <= self.bits <= 16:
            raise ValueError(f"expected 1 to 16 bits a logit, got {self.bits}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK:
    """The k largest and the mass of the rest."""

    k: int

    def __post_init__(self):
        at_least(1, k=self.k)


LOGITS = {"full": Full, "bits": Bits, "topk": TopK}


@dataclasses.dataclass(frozen=True, kw_only=True)
class All:
    """Every text of the pool, in the first round."""


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class _Part:
    """A fraction of the pool, chosen after warmup_rounds of FedAvg."""

    fraction: float
    warmup_rounds: int = 5

    def __post_init__(self):
        positive(fraction=self.fraction)
        share("fraction", self.fraction)
        at_least(1, warmup_rounds=self.warmup_rounds)


class Unsure(_Part):
    """The texts that the student is least sure of."""


class AtRandom(_Part):
    """As many texts at random, as a control."""


ASK = {"all": All, "unsure": Unsure, "random": AtRandom}


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class DataConfig:
    """Of every seed's draw. num_clients clients of rows_per_client texts each, their labels in proportions of
    Dirichlet(alpha). num_pool public texts without labels. num_validation: for tuning only. num_test: the same rows for
    all seeds. num_judged: of the test rows, those that the FM sees as well. num_labelled: of these, those whose labels
    the evaluator may see; and as many public rows with labels, for the temperature of the FM's answers."""

    num_clients: int = 20
    rows_per_client: int = 30
    alpha: float = 0.1
    num_pool: int = 200
    num_labelled: int = 40
    num_validation: int = 500
    num_test: int = 600
    num_judged: int = 300
    num_buckets: int = 4096
    max_ngrams: int = 48

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type is int:
                at_least(2, **{field.name: getattr(self, field.name)})
        positive(alpha=self.alpha)
        if self.num_judged > self.num_test:
            raise ValueError(f"num_judged is {self.num_judged}, but num_test only {self.num_test}")
        if self.num_labelled > self.num_pool:
            raise ValueError(f"num_labelled is {self.num_labelled}, but num_pool only {self.num_pool}")

    @property
    def num_train(self) -> int:
        """Texts of the training file that a seed needs."""
        return self.num_clients * self.rows_per_client + self.num_pool + self.num_validation


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class PlacementConfig:
    """Where the FM answers. placement: one of PLACEMENTS, the first choice; fallback: another that answers while the
    way to the first is down, None for none. mean_up_rounds, mean_down_rounds: of the two-state chain of that way; down
    0 is no outage. only_first_round: the way is up in the first round and down ever after. ask_every_round: the FM is
    asked anew in each round, and what it said before serves in an outage only; else it serves always. timeout_s: how
    long who asks waits for an answer that does not come."""

    placement: str = "edge"
    fallback: str | None = None
    mean_up_rounds: float = 1.0
    mean_down_rounds: float = 0.0
    only_first_round: bool = False
    ask_every_round: bool = False
    timeout_s: float = 1.0

    def __post_init__(self):
        one_of(PLACEMENTS, placement=self.placement)
        if self.fallback is not None:
            one_of(PLACEMENTS, fallback=self.fallback)
        if self.fallback == self.placement:
            raise ValueError(f"fallback={self.fallback} is the placement itself")
        if not self.mean_up_rounds > 0 or not self.mean_down_rounds >= 0:
            given = f"{self.mean_up_rounds:g}:{self.mean_down_rounds:g}"
            raise ValueError(f"outage={given}: expected UP above 0 and DOWN of at least 0, in rounds")
        at_least(0, timeout_s=self.timeout_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class LoraTuning:
    """Of a silo's FM. num_steps of Adam on batches of batch_size prompts of at most max_tokens tokens (longer texts are
    cut); mutual_steps: on the public rows where the small model knows better. alpha is 2 rank."""

    rank: int = 8
    learning_rate: float = 2e-3
    num_steps: int = 16
    mutual_steps: int = 6
    batch_size: int = 8
    max_tokens: int = 80

    def __post_init__(self):
        for name in ("rank", "num_steps", "mutual_steps", "batch_size", "max_tokens"):
            at_least(1, **{f"lora_{name}": getattr(self, name)})
        positive(lora_lr=self.learning_rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class ServicesConfig:
    """A run: every arm of `services` with the same data, network and FedAvg settings, for `seeds` seeds.

    learning_rates x local_epochs: what FedAvg is tuned over, at num_rounds rounds, by validation rows of another seed;
    learning_rates x server_lrs, with the fewest local epochs: what the arms with a teacher at the server are;
    learning_rates x local_epochs x teacher_weights, shares of a client's loss that are its teacher's: what the silos'
    arms are. server_steps: of the server's distillation in a round. student_lr: of the over-fitting alarm's students.
    fm_weight: of the FM in the mixed teacher. attack_fraction, reweight_temperature, reweight_floor: of the re-
    weighting arms. target_accuracy: to which rounds, seconds and joules are counted. network: the clients' radio; None
    counts no client's seconds. student: "linear", or "hidden" for a model with a hidden layer, whose features can be
    aligned and calibrated. align_strengths: of feature alignment, tuned over. num_virtual: CCVR's features of each
    class. lora: of the silos' own FMs. fm_access: "logits", or "text" for an API that answers in words alone.
    """

    services: tuple[str, ...] = ("distill", "augment", "evaluate", "trust")
    data: DataConfig = DataConfig()
    placement: PlacementConfig = PlacementConfig()
    num_rounds: int = 30
    cohort_size: int = 5
    learning_rates: tuple[float, ...] = (8.0, 24.0)
    local_epochs: tuple[int, ...] = (1,)
    server_steps: int = 15
    server_lrs: tuple[float, ...] = (4.0,)
    teacher_weights: tuple[float, ...] = (0.5,)
    student_lr: float = 8.0
    fm_weight: float = 0.5
    logits: Full | Bits | TopK = Full()
    ask: All | Unsure | AtRandom = All()
    attack_fraction: float = 0.2
    reweight_temperature: float = 0.1
    reweight_floor: float = 0.2
    num_generated: int = 200
    target_accuracy: float = 0.6
    network: NetworkConfig | None = None
    student: str = "linear"
    align_strengths: tuple[float, ...] = (0.1, 1.0)
    num_virtual: int = 100
    lora: LoraTuning = LoraTuning()
    fm_access: str = "logits"
    seeds: int = 2
    seed: int = 0

    def __post_init__(self):
        for name in self.services:
            one_of(SERVICES, services=name)
            if self.fm_access == "text" and name in NEED_LOGITS:
                raise ValueError(f"services={name} needs the FM's logits, and with fm_access=text it gives only text")
            if self.student == "linear" and name in NEED_FEATURES:
                raise ValueError(f"services={name} needs features: student=hidden, not student=linear")
        one_of(STUDENTS, student=self.student)
        one_of(ACCESS, fm_access=self.fm_access)
        for name in ("num_rounds", "cohort_size", "server_steps", "seeds", "num_generated", "num_virtual"):
            at_least(1, **{name: getattr(self, name)})
        at_least(0, seed=self.seed)
        for name in ("learning_rates", "local_epochs", "server_lrs", "align_strengths", "teacher_weights"):
            same_length(**{name: getattr(self, name)})
            positive(**{name: min(getattr(self, name))})
        positive(student_lr=self.student_lr, reweight_temperature=self.reweight_temperature)
        for name in ("fm_weight", "attack_fraction", "reweight_floor", "target_accuracy"):
            share(name, getattr(self, name))
        share("teacher_weights", max(self.teacher_weights))
        if self.cohort_size > self.data.num_clients:
            raise ValueError(f"cohort_size is {self.cohort_size}, but there are {self.data.num_clients} clients")
        if self.network is not None and self.network.aggregation.startswith("over_the_air"):
            raise ValueError(f"aggregation={self.network.aggregation}: the server's own training needs single updates")
        if not isinstance(self.ask, All) and self.ask.warmup_rounds >= self.num_rounds:
            raise ValueError(f"ask: warmup_rounds is {self.ask.warmup_rounds}, but num_rounds {self.num_rounds}")

    def check_classes(self, num_classes: int) -> None:
        """Raises ValueError where the answers' format does not fit the task."""
        if isinstance(self.logits, TopK) and self.logits.k >= num_classes:
            raise ValueError(f"logits=topk:{self.logits.k}: expected fewer than the task's {num_classes} classes")
