"""The network that rounds go over."""

import dataclasses
from collections.abc import Iterator

from fmfl_jax.experiment.config.federation import FederationConfig
from fmfl_jax.experiment.methods.aggregators import AGGREGATORS, Mean
from fmfl_jax.experiment.methods.algorithms import ALGORITHMS
from fmfl_jax.experiment.methods.codecs import CODECS, Identity
from fmfl_jax.experiment.methods.contributions import CONTRIBUTIONS
from fmfl_jax.experiment.methods.incentives import INCENTIVES
from fmfl_jax.experiment.methods.names import name_of
from fmfl_jax.experiment.methods.selections import Deadline
from fmfl_jax.finite import finite_fields
from fmfl_jax.wireless.network import Network
from fmfl_jax.wireless.presets import PRESETS

DELIVERIES = ("arq", "coded", "progressive", "fountain")
AGGREGATIONS = ("survivors", "unbiased", "last_delta", "over_the_air", "over_the_air_truncated")


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class NetworkConfig:
    """The network that rounds go over: a preset of fmfl_jax/wireless/presets.py by name, with the run's number of
    clients and, unless None, its own deadline. penetration: where the clients are, one of
    wireless.penetration.KINDS. devices: names of device classes, dealt to the clients in turn.
    aggregation: how what arrives is joined, one of AGGREGATIONS.
    delivery: how the base model is brought to the clients over fading channels, some of DELIVERIES: losses repaired by
    sending again (arq, what is done without fountain) or by random combinations (fountain), weights coded without loss,
    clients that compute while layers arrive. Empty: the whole at the farthest client's rate, without fading."""

    network: str
    deadline_s: float | None = None
    penetration: str = "none"
    devices: tuple[str, ...] = ("phone",)
    aggregation: str = "survivors"
    delivery: tuple[str, ...] = ()

    def __post_init__(self):
        if self.network not in PRESETS:
            raise ValueError(f"network={self.network}: expected none or one of {', '.join(PRESETS)}")
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation={self.aggregation}: expected one of {', '.join(AGGREGATIONS)}")
        unknown = set(self.delivery) - set(DELIVERIES)
        if unknown or len(set(self.delivery)) < len(self.delivery) or {"arq", "fountain"} <= set(self.delivery):
            raise ValueError(
                f"delivery={','.join(self.delivery)}: expected some of {', '.join(DELIVERIES)}, once each, and of arq "
                "and fountain at most one"
            )
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ValueError(f"deadline_s must be above 0, got {self.deadline_s}")
        if self.penetration != "none" and PRESETS[self.network](num_clients=1).scenario is None:
            raise ValueError(
                f"penetration={self.penetration} needs a network with TR 38.901's path loss (umi_20), "
                f"not {self.network}"
            )

    def make_network(self, num_clients: int) -> Network:
        """The Network of num_clients clients."""
        own = {} if self.deadline_s is None else {"deadline_s": self.deadline_s}
        return PRESETS[self.network](num_clients=num_clients, penetration=self.penetration, **own)


def network_refusals(fed: FederationConfig, network: NetworkConfig | None) -> Iterator[str]:
    """Why this federation cannot run over this network, or without one."""
    algorithm = f"algorithm={name_of(fed.algorithm, ALGORITHMS)}"
    if isinstance(fed.selection, Deadline) and (network is None or network.deadline_s is None):
        yield "selection=deadline needs a network and a deadline_s"
    if fed.incentive is not None and network is None:
        yield f"incentive={name_of(fed.incentive, INCENTIVES)} needs a network: clients are paid for its joules"
    if network is None or network.aggregation == "survivors":
        return
    what = f"aggregation={network.aggregation}"
    if fed.contribution is not None:
        contribution = f"contribution={name_of(fed.contribution, CONTRIBUTIONS)}"
        yield f"{what} with {contribution}: coalitions' models are means over those delivered"
    if fed.privacy and "dp_sgd" not in fed.privacy:
        yield f"{what} with privacy={','.join(fed.privacy)}: it needs the plain sum of what is delivered"
    if fed.aggregator != Mean() or fed.algorithm.own_aggregation:
        aggregator = f"aggregator={name_of(fed.aggregator, AGGREGATORS)}"
        yield f"{what} with {algorithm} {aggregator}: it is itself how updates are joined"
    if network.aggregation.startswith("over_the_air") and fed.uplink != Identity():
        yield f"{what} with uplink={name_of(fed.uplink, CODECS)}: analog symbols are sent as they are"
