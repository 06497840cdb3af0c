"""What a case study is made of: text, partition, fine-tuning methods, server, network: a checked frozen dataclass."""

import dataclasses
from collections.abc import Iterator

from fmfl_jax.config import LlamaConfig
from fmfl_jax.experiment.config.client_counts import ClientCounts, client_counts
from fmfl_jax.experiment.config.data import PartitionConfig, TextConfig
from fmfl_jax.experiment.config.federation import FederationConfig, server_refusals
from fmfl_jax.experiment.config.network import NetworkConfig, network_refusals
from fmfl_jax.experiment.config.pretrain import PretrainConfig
from fmfl_jax.experiment.config.rounds import RoundsConfig
from fmfl_jax.experiment.config.server import ServerConfig
from fmfl_jax.experiment.methods.algorithms import ALGORITHMS
from fmfl_jax.experiment.methods.names import name_of
from fmfl_jax.finite import finite_fields
from fmfl_jax.peft.lora import LoraConfig, lora_targets
from fmfl_jax.peft.split import FullConfig, PeftConfig, check_context
from fmfl_jax.peft.tensor_parallel import check_cut
from fmfl_jax.quant.awq import QuantConfig

WEIGHTS = ("fp", "awq", "gptq", "rtn")


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class FineTuning:
    """One way of fine-tuning and the learning rate of the clients' AdamW."""

    peft: PeftConfig
    learning_rate: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaseStudyConfig:
    """Everything a case study depends on. checkpoint None: `model` is pre-trained as `pretrain` says.

    fine_tuning: name -> FineTuning. weights: some of WEIGHTS ("rtn", round to nearest, is the baseline).
    network None: no network. random_init: `model` is taken untrained, to measure costs at sizes of which no checkpoint
    is at hand. remat: each block is computed again in the backward pass, which bounds the memory.
    dequantize: a checkpoint's 4-bit weights are unpacked to dtype before `weights` is looked at. head: of 4-bit
    models, "fp" as it is, or "int8" or "int4" rounded to nearest (a tied head gets a packed copy). model_parallel:
    devices that heads and hidden units of the base are cut over; the other axis of the devices is the clients'.
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
    fine_tuning: dict[str, FineTuning]
    weights: tuple[str, ...]
    federation: FederationConfig = FederationConfig()
    network: NetworkConfig | None = None
    random_init: bool = False
    remat: bool = False
    dequantize: bool = False
    head: str = "fp"
    model_parallel: int = 1

    def __post_init__(self):
        unknown = [w for w in self.weights if w not in WEIGHTS]
        if unknown or not self.weights:
            raise ValueError(f"weights must be among {', '.join(WEIGHTS)}, got {','.join(self.weights)!r}")
        if self.head not in ("fp", "int8", "int4"):
            raise ValueError(f"head={self.head}: expected fp, int8 or int4")
        if not self.fine_tuning:
            raise ValueError("the case study needs at least one peft method")
        if (self.checkpoint is None) == (self.model is None):
            raise ValueError("give either a checkpoint or a model to pre-train")
        if self.random_init and self.checkpoint is not None:
            raise ValueError("random_init takes a model without a checkpoint")
        if self.rounds.cohort_size > self.partition.num_clients:
            raise ValueError(f"cohort_size {self.rounds.cohort_size} exceeds the {self.partition.num_clients} clients")
        if any(isinstance(t.peft, FullConfig) for t in self.fine_tuning.values()) and self.weights != ("fp",):
            raise ValueError("full fine-tuning needs weights=fp: 4-bit weights have no gradient")
        self.client_counts()
        if self.model is not None:
            check_model(self, self.model)
        for reason in federation_refusals(self):
            raise ValueError(reason)

    def client_counts(self) -> ClientCounts:
        """How many attack, and how many the defence is set to. Raises ValueError where a share above 0 makes none."""
        return client_counts(
            self.federation, num_clients=self.partition.num_clients, cohort_size=self.rounds.cohort_size
        )


def check_model(c: CaseStudyConfig, model: LlamaConfig) -> None:
    """Raises ValueError where the windows of a fine-tuning, with its virtual tokens, exceed the model's context, where
    a LoRA's target is none of its projections, and where the model does not fit model_parallel devices."""
    for method in c.fine_tuning.values():
        check_context(model, method.peft, c.text.seq_len)
        if isinstance(method.peft, LoraConfig):
            lora_targets(model, method.peft.targets)
        if c.model_parallel != 1:
            check_cut(model, method.peft, c.model_parallel)


def federation_refusals(c: CaseStudyConfig) -> Iterator[str]:
    """Why this federation cannot tune this model over this network; nothing where it can. Fields are name=value."""
    fed = c.federation
    algorithm = f"algorithm={name_of(fed.algorithm, ALGORITHMS)}"
    ranks = [method.peft.rank for method in c.fine_tuning.values() if isinstance(method.peft, LoraConfig)]
    lora = len(ranks) == len(c.fine_tuning)
    private_rank = 0 if fed.personalization is None else fed.personalization.private_rank
    if (fed.algorithm.lora_view is not None or private_rank) and not lora:
        yield f"{algorithm}{' with private ranks' if private_rank else ''} needs peft=lora"
    if fed.algorithm.lora_view == "with_base" and c.weights != ("fp",):
        yield (
            f"{algorithm} adds every round's product to the base, which 4 bits cannot hold: it needs weights=fp; "
            "flexlora aggregates as exactly beside a 4-bit base"
        )
    if fed.algorithm.factored and not c.server.is_plain:
        yield (
            f"{algorithm} with server_optimizer={c.server.optimizer}: its update is a product of factors, which has no "
            "coordinates that an optimizer could keep moments of"
        )
    if c.model_parallel != 1 and fed.keeps_personal_models:
        yield f"model_parallel={c.model_parallel} with personal models: each is evaluated on one device"
    if c.model_parallel != 1 and fed.algorithm.lora_view in ("b_only", "with_base"):
        yield f"model_parallel={c.model_parallel} with {algorithm}: it moves parameters into the base, which is cut"
    yield from network_refusals(fed, c.network)
    yield from server_refusals(fed, c.server)
    if fed.lora_ranks and lora:
        largest = min(ranks)
        if max(fed.lora_ranks) > largest:
            yield f"lora_ranks={','.join(map(str, fed.lora_ranks))}: the model's rank is {largest}"
