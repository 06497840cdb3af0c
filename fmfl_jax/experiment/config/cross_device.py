"""What a federation of small models depends on: the task, and the run."""

import dataclasses
from collections.abc import Iterator

from fmfl_jax.experiment.config.federation import FederationConfig, server_refusals
from fmfl_jax.experiment.config.network import NetworkConfig, network_refusals
from fmfl_jax.experiment.config.rounds import RoundsConfig
from fmfl_jax.experiment.config.server import ServerConfig
from fmfl_jax.experiment.methods.aggregators import FLTrust
from fmfl_jax.experiment.methods.algorithms import ALGORITHMS, FedAvg
from fmfl_jax.experiment.methods.names import name_of
from fmfl_jax.fed.core.execution import MODES
from fmfl_jax.finite import finite_fields

TASKS = ("linear", "images", "agnews")


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class TaskConfig:
    """What the clients learn. "linear" and "images" are made from the seed; "agnews" reads two files of text<TAB>label.

    alpha: of the Dirichlet distribution over labels; the linear task has its own unequal clients.
    """

    name: str = "linear"
    train_text: str | None = None
    test_text: str | None = None
    num_clients: int = 1000
    alpha: float = 0.3
    seed: int = 0

    def __post_init__(self):
        if self.name not in TASKS:
            raise ValueError(f"task is {self.name!r}: expected one of {', '.join(TASKS)}")
        if self.num_clients < 1:
            raise ValueError(f"num_clients must be at least 1, got {self.num_clients}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}")
        given = [name for name in ("train_text", "test_text") if getattr(self, name) is not None]
        if self.name == "agnews" and len(given) < 2:
            raise ValueError("task agnews needs train_text and test_text, files of lines text<TAB>label")
        if self.name != "agnews" and given:
            raise ValueError(f"{given[0]} is for task agnews: task {self.name} makes its data")


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class CrossDeviceConfig:
    """A run. In each round cohort_size clients (on average, where the selection is Poisson's) take local_epochs of SGD
    over their rows.

    federation: any but LoRA's algorithms, aggregators that need data of the server's, and privacy of examples. network:
    what the rounds go over; None for none. execution: "auto" (fed/core/execution.py, `default_mode`) or a mode.
    eval_every, checkpoint_every: in rounds; the last round is always evaluated and kept.
    """

    num_rounds: int = 100
    cohort_size: int = 50
    batch_size: int = 10
    local_epochs: int = 1
    client_lr: float = 0.1
    federation: FederationConfig = FederationConfig()
    server: ServerConfig = ServerConfig()
    network: NetworkConfig | None = None
    execution: str = "auto"
    seed: int = 0
    eval_every: int = 10
    checkpoint_every: int = 50

    def __post_init__(self):
        self.rounds(1)  # checks its own numbers
        if self.local_epochs < 1:
            raise ValueError(f"local_epochs must be at least 1, got {self.local_epochs}")
        if self.execution not in ("auto", *MODES):
            raise ValueError(f"execution is {self.execution!r}: expected one of auto, {', '.join(MODES)}")
        if not 0 < self.client_lr < float("inf"):
            raise ValueError(f"client_lr must be above 0, got {self.client_lr}")
        for reason in _refusals(self):
            raise ValueError(reason)

    def rounds(self, local_steps: int) -> RoundsConfig:
        """The rounds, with the local steps of the largest client. The device is kept busy: rounds are short."""
        return RoundsConfig(
            num_rounds=self.num_rounds,
            cohort_size=self.cohort_size,
            local_steps=local_steps,
            batch_size=self.batch_size,
            seed=self.seed,
            eval_every=self.eval_every,
            checkpoint_every=self.checkpoint_every,
            wait_for_rounds=False,
        )

    @property
    def name(self) -> str:
        """The algorithm; of FedAvg the name that its server's optimizer gives it."""
        if type(self.federation.algorithm) is not FedAvg:
            return name_of(self.federation.algorithm, ALGORITHMS)
        if self.server.optimizer != "sgd":
            return self.server.optimizer
        return "fedavgm" if self.server.momentum else "fedavg"


def _refusals(c: CrossDeviceConfig) -> Iterator[str]:
    """What a cross-device run does not serve. Fields stand as name=value."""
    fed = c.federation
    private_rank = 0 if fed.personalization is None else fed.personalization.private_rank
    if fed.algorithm.lora_view is not None or private_rank:
        yield f"algorithm={name_of(fed.algorithm, ALGORITHMS)} is of LoRA factors, which small models have none of"
    if "dp_sgd" in fed.privacy:
        yield "privacy=dp_sgd is for language models: small models take dp and secure"
    if fed.client_optimizer == "adamw":
        yield "client_optimizer=adamw is for language models: small models take SGD steps"
    if isinstance(fed.aggregator, FLTrust):
        yield "aggregator=fltrust compares with the server's data, which a cross-device run has none of"
    if c.network is not None and c.network.delivery:
        yield f"delivery={','.join(c.network.delivery)} is of a base model, which a cross-device run has none of"
    yield from network_refusals(fed, c.network)
    yield from server_refusals(fed, c.server)
