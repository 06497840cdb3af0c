"""The flags of the network that rounds go over."""

from absl import flags

from fmfl_jax.experiment.config.network import NetworkConfig
from fmfl_jax.experiment.network.workload import deal_devices
from fmfl_jax.wireless.penetration import KINDS

_NETWORK = flags.DEFINE_string(
    "network",
    "none",
    "Network that the rounds go over: none, umi_20, chen, yang, fedcs, "
    "tran or facts_20 (fmfl_jax/wireless/presets.py), with --num_clients clients.",
)
_DEADLINE = flags.DEFINE_float("deadline_s", None, "Seconds after which a round closes; default: the network's own.")
_PENETRATION = flags.DEFINE_enum(
    "penetration",
    "none",
    KINDS,
    "Where the clients of a TR 38.901 network (umi_20) are: none (outdoors), o2i_low or o2i_high (in a building of low "
    "or high loss), car.",
)
_DEVICE = flags.DEFINE_list(
    "device", ["phone"], "The clients' devices, dealt in turn: any of phone, vehicle, edge_box."
)
_AGGREGATION = flags.DEFINE_string(
    "aggregation",
    "survivors",
    "How a network's losses are met: survivors (the mean of "
    "those delivered, which favours good links), unbiased (their data over their probability of "
    "delivery), last_delta (the last update that arrived stands in), over_the_air or "
    "over_the_air_truncated (all send at once, the channel adds).",
)
_DELIVERY = flags.DEFINE_list(
    "delivery",
    [],
    "How the base model is broadcast to the clients over fading channels: any of coded (weights coded without loss), "
    "progressive (clients compute while layers arrive), fountain (losses are repaired by random combinations) or arq "
    "(by sending again). Default: at the farthest client's rate, as if nothing faded.",
)


def network_from_flags() -> NetworkConfig | None:
    """The network, None for none. Raises ValueError for flags that need one."""
    if _NETWORK.value == "none":
        for flag in (_DEADLINE, _PENETRATION, _DEVICE, _AGGREGATION, _DELIVERY):
            if flag.present:
                raise ValueError(f"--{flag.name} needs a --network")
        return None
    deal_devices(tuple(_DEVICE.value), 1)  # the names
    return NetworkConfig(
        network=_NETWORK.value,
        deadline_s=_DEADLINE.value,
        penetration=_PENETRATION.value,
        devices=tuple(_DEVICE.value),
        aggregation=_AGGREGATION.value,
        delivery=tuple(_DELIVERY.value),
    )
