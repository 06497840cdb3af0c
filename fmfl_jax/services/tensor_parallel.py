"""What tensor parallelism costs a token (section III-D): inside a box, and over a radio.

Each layer's products are cut over n devices (Shoeybi et al., 2019) and its two outputs are summed: two all-reduces a
layer of a token's activations, S byte. A ring takes

    2 (n - 1) / n S / rate + 2 (n - 1) latency

(Patarasuk and Yuan, 2009), so a token of a model with L layers waits 2 L times that. LLaMA-7B in float32 on 4 devices
at 100 Mbit/s and 1 ms: 7.966 ms each, 510 ms a token, whatever the devices compute. `models/tensor_parallel.py` runs
it.

    >>> token_s(one_device_s=0.06, num_devices=4, num_layers=32, activation_bytes=16384, link=radio)
"""

import dataclasses
from typing import NamedTuple

from fmfl_jax.finite import finite_fields
from fmfl_jax.services.checks import at_least, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class Interconnect:
    """Between neighbours of the ring: rate_bps each way, latency_s of a message."""

    rate_bps: float
    latency_s: float

    def __post_init__(self):
        positive(rate_bps=self.rate_bps)
        at_least(0, latency_s=self.latency_s)


class Best(NamedTuple):
    """num_devices, and token_s with them."""

    num_devices: int
    token_s: float


def ring_all_reduce_s(num_devices: int, payload_bytes: float, link: Interconnect) -> float:
    """Seconds until every device has the sum of all devices' payload_bytes."""
    at_least(1, num_devices=num_devices)
    at_least(0, payload_bytes=payload_bytes)
    n = num_devices
    return 2 * (n - 1) / n * 8 * payload_bytes / link.rate_bps + 2 * (n - 1) * link.latency_s


def token_s(
    *, one_device_s: float, num_devices: int, num_layers: int, activation_bytes: float, link: Interconnect
) -> float:
    """Seconds of a token: one_device_s / n of products and memory, and 2 L all-reduces that wait for them.

    activation_bytes: of one token, D values as they are sent; that of T tokens of a prompt is T times as much.
    """
    at_least(0, one_device_s=one_device_s)
    at_least(1, num_layers=num_layers)
    return one_device_s / num_devices + 2 * num_layers * ring_all_reduce_s(num_devices, activation_bytes, link)


def best_num_devices(
    counts, *, one_device_s: float, num_layers: int, activation_bytes: float, link: Interconnect
) -> Best:
    """The number of devices, of `counts`, with the fastest token; the fewest of equals."""
    found = [
        Best(n, token_s(one_device_s=one_device_s, num_devices=n, num_layers=num_layers,
                        activation_bytes=activation_bytes, link=link))
        for n in sorted(counts)
    ]  # fmt: skip
    if not found:
        raise ValueError("counts is empty: no number of devices to choose from")
    return min(found, key=lambda best: best.token_s)
