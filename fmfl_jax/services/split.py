"""Split inference (section III-D): which device computes which layers, contiguous blocks of a chain.

    latency = sum of the blocks' compute + the transfers between them (a request alone)
    stage   = the slowest block or transfer (a full pipeline: a request leaves every `stage` seconds)

Input, output and, where it is asked for, the first layer (which sees the text) are at the source. A transfer is one
position's or prompt's activations, the same at every cut. Dynamic programming over blocks:

- each device at most once: the state is (layers placed, set of used devices, last device), 2^n states, for small n;
- revisits: (layers placed, last device). A block's memory is bound, not the sum of a device's blocks, so this is for
  weights that are loaded when their turn comes. Only for latency: in a pipeline a device's blocks share its time.

EdgeShard (Zhang et al., 2024) solves the same two problems so.

    >>> cost = ChainCost(compute_s, memory_bytes, capacity_bytes, transfer_s)
    >>> split_layers(cost, objective="latency").devices     # (0, 0, 0, 0, 1, 1)
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

OBJECTIVES = ("latency", "stage")
MOST_DEVICES = 16  # that are visited at most once: the state has a set of them


@dataclasses.dataclass(frozen=True)
class ChainCost:
    """compute_s [L, n]: of a layer on a device; memory_bytes [L]; capacity_bytes [n]; transfer_s [n, n]: activations
    from one device to another, 0 on the diagonal. Finite, at least 0, but for transfers: infinite is no link."""

    compute_s: np.ndarray
    memory_bytes: np.ndarray
    capacity_bytes: np.ndarray
    transfer_s: np.ndarray

    def __post_init__(self):
        for field in dataclasses.fields(self):
            array = np.asarray(getattr(self, field.name), np.float64)
            object.__setattr__(self, field.name, array)
            finite = np.isfinite(array).all() or (field.name == "transfer_s" and not np.isnan(array).any())
            if not finite or (array < 0).any():
                raise ValueError(f"{field.name} must hold finite numbers of at least 0")
        layers, devices = self.compute_s.shape if self.compute_s.ndim == 2 else (0, 0)
        expected = {"memory_bytes": (layers,), "capacity_bytes": (devices,), "transfer_s": (devices, devices)}
        for name, shape in expected.items():
            if getattr(self, name).shape != shape or not layers or not devices:
                raise ValueError(f"compute_s {self.compute_s.shape} and {name} {getattr(self, name).shape} do not fit")
        if np.diag(self.transfer_s).any():
            raise ValueError("transfer_s: a device reaches itself in 0 s")

    @property
    def num_layers(self) -> int:
        return len(self.compute_s)

    @property
    def num_devices(self) -> int:
        return len(self.capacity_bytes)


class Split(NamedTuple):
    """devices: of each layer; seconds: of the objective."""

    devices: tuple[int, ...]
    seconds: float


def split_layers(
    cost: ChainCost, *, objective: str = "latency", source: int = 0, revisits: bool = False, pin_first: bool = True
) -> Split:
    """The best split.

    source: the device of input and output; pin_first: it computes the first layer too. revisits: a device may have
    several blocks.

    Raises ValueError where no split fits the memories and links, for an unknown objective, for revisits of a pipeline,
    and for more than MOST_DEVICES devices without revisits.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective}: expected one of {', '.join(OBJECTIVES)}")
    if not 0 <= source < cost.num_devices:
        raise ValueError(f"source={source}: expected a device of 0..{cost.num_devices - 1}")
    if revisits and objective == "stage":
        raise ValueError("revisits=True is for objective=latency: in a pipeline a device's blocks share its time")
    if not revisits and cost.num_devices > MOST_DEVICES:
        raise ValueError(f"{cost.num_devices} devices, each used at most once: at most {MOST_DEVICES}")
    join = (lambda a, b: a + b) if objective == "latency" else max
    blocks = _blocks(cost)
    # state (last device, used) at `start` layers placed -> (seconds, devices of the layers so far)
    states: list[dict[tuple[int, int], tuple[float, tuple[int, ...]]]] = [{} for _ in range(cost.num_layers + 1)]
    states[0][source, 0] = (0.0, ())
    for start in range(cost.num_layers):
        for (last, used), (seconds, devices) in states[start].items():
            for device in range(cost.num_devices):
                again = start > 0 and device == last  # it would be one block
                if again or used >> device & 1 or (start == 0 and pin_first and device != source):
                    continue
                arrived = join(seconds, float(cost.transfer_s[last, device]))
                after = 0 if revisits else used | 1 << device
                for end, block_s in blocks[device][start]:
                    total = join(arrived, block_s)
                    known = states[end].get((device, after))
                    if total < math.inf and (known is None or total < known[0]):
                        states[end][device, after] = total, (*devices, *[device] * (end - start))
    done = [
        Split(devices, join(seconds, float(cost.transfer_s[last, source])))
        for (last, _), (seconds, devices) in states[-1].items()
    ]
    best = min(done, key=lambda split: split.seconds, default=None)
    if best is None or best.seconds == math.inf:
        raise ValueError(
            f"no split of {cost.num_layers} layers ({cost.memory_bytes.sum():.4g} byte) fits the devices' memories "
            f"({', '.join(f'{c:.4g}' for c in cost.capacity_bytes)} byte) and links"
        )
    return best


def _blocks(cost: ChainCost) -> list[list[list[tuple[int, float]]]]:
    """[device][start]: (end, compute seconds) of the blocks [start, end) that fit the device."""
    memory = np.concatenate([[0.0], np.cumsum(cost.memory_bytes)])
    seconds = np.concatenate([np.zeros((1, cost.num_devices)), np.cumsum(cost.compute_s, axis=0)])
    slack = 1e-9 * memory[-1]
    return [
        [
            [
                (end, float(seconds[end, d] - seconds[start, d]))
                for end in range(start + 1, cost.num_layers + 1)
                if memory[end] - memory[start] <= cost.capacity_bytes[d] + slack
            ]
            for start in range(cost.num_layers)
        ]
        for d in range(cost.num_devices)
    ]
