"""The network that rounds go over."""

import dataclasses

from fmfl_jax.finite import finite_fields
from fmfl_jax.wireless.network import Network
from fmfl_jax.wireless.presets import PRESETS

AGGREGATIONS = ("survivors", "unbiased", "last_delta", "over_the_air", "over_the_air_truncated")


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class NetworkConfig:
    """The network that rounds go over: a preset of fmfl_jax/wireless/presets.py by name, with the run's number of
    clients and, unless None, another deadline. devices: names of device classes, dealt to the clients in turn.
    aggregation: how what arrives is joined, one of AGGREGATIONS."""

    network: str
    deadline_s: float | None = None
    devices: tuple[str, ...] = ("phone",)
    aggregation: str = "survivors"

    def __post_init__(self):
        if self.network not in PRESETS:
            raise ValueError(f"network={self.network}: expected none or one of {', '.join(PRESETS)}")
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation={self.aggregation}: expected one of {', '.join(AGGREGATIONS)}")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ValueError(f"deadline_s must be above 0, got {self.deadline_s}")

    def make_network(self, num_clients: int) -> Network:
        """The Network of num_clients clients."""
        changes = {} if self.deadline_s is None else {"deadline_s": self.deadline_s}
        return PRESETS[self.network](num_clients=num_clients, **changes)
