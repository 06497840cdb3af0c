"""Seconds, joules and bytes of local work: the cycles model of the literature, and FLOPs and bandwidth for language
models.

Cycles: t = C D / f, E = kappa C D f^2 (Burd and Brodersen 1996; used by Tran, Yang, Chen et al.). Language models: 2 N
FLOPs a token forward, 2 N for the gradient of the activations, 2 N for that of the weights (Kaplan et al. 2020), so 6 N
for full training and 4 N through a frozen base; recomputation adds a forward pass.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.finite import finite_fields
from fmfl_jax.wireless import special


def cycles_time_s(cycles_per_bit, data_bits, frequency_hz):
    """t = C D / f, s: the compute_s that the papers behind the presets give `simulate_round`. Broadcasts."""
    return cycles_per_bit * data_bits / frequency_hz


def cycles_energy_j(cycles_per_bit, data_bits, frequency_hz, kappa: float = 1e-28):
    """E = kappa C D f^2, J. Broadcasts. The order of the product keeps float32 in range."""
    return (kappa * jnp.square(frequency_hz)) * (cycles_per_bit * data_bits)


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class DeviceClass:
    """A kind of client. Peak half-precision FLOP/s, the share of it training reaches, DRAM bytes/s, memory that a job
    may take (bytes), and power while it runs (W)."""

    name: str
    peak_flops: float
    utilization: float
    memory_bandwidth_bytes_s: float
    memory_bytes: float
    active_power_w: float

    def __post_init__(self):
        for field in ("peak_flops", "memory_bandwidth_bytes_s", "memory_bytes", "active_power_w"):
            special.require_positive(**{f"{self.name}.{field}": getattr(self, field)})
        if not 0.0 < self.utilization <= 1.0:
            raise ValueError(f"{self.name}.utilization must be in (0, 1], got {self.utilization}")


def phone() -> DeviceClass:
    """A flagship phone: 8 of 12 GB free for the job, LPDDR5X, about 4 TFLOP/s fp16 on the GPU. Nominal figures of the
    class, not of one product: they set an order of magnitude."""
    return DeviceClass(
        name="phone",
        peak_flops=4e12,
        utilization=0.25,
        memory_bandwidth_bytes_s=60e9,
        memory_bytes=8e9,
        active_power_w=6.0,
    )


def vehicle() -> DeviceClass:
    """A vehicle's computer of the Jetson Orin class with 32 GB, 24 of them free (nominal: 8 TFLOP/s, 200 GB/s, 40
    W)."""
    return DeviceClass(
        name="vehicle",
        peak_flops=8e12,
        utilization=0.35,
        memory_bandwidth_bytes_s=200e9,
        memory_bytes=24e9,
        active_power_w=40.0,
    )


def edge_box() -> DeviceClass:
    """An edge server with one 48 GB data-centre GPU (nominal: 180 TFLOP/s dense fp16, 860 GB/s, 350 W)."""
    return DeviceClass(
        name="edge_box",
        peak_flops=180e12,
        utilization=0.4,
        memory_bandwidth_bytes_s=860e9,
        memory_bytes=44e9,
        active_power_w=350.0,
    )


class Devices(NamedTuple):
    """The devices of C clients as arrays [C]: sustained FLOP/s, bytes/s, bytes, W."""

    flops: jax.Array
    memory_bandwidth_bytes_s: jax.Array
    memory_bytes: jax.Array
    active_power_w: jax.Array


def stack_devices(devices) -> Devices:
    """One array entry per client from a sequence of C DeviceClass."""
    if not devices:
        raise ValueError("devices must name at least one DeviceClass")
    column = lambda values: jnp.asarray(np.asarray(values, np.float32))
    return Devices(
        column([d.peak_flops * d.utilization for d in devices]),
        column([d.memory_bandwidth_bytes_s for d in devices]),
        column([d.memory_bytes for d in devices]),
        column([d.active_power_w for d in devices]),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class Workload:
    """A language model as its client sees it. Counts are of parameters that are multiplied (no embedding look-up).

    base_params, trainable_params: N of the base and of the PEFT modules beside it (0 trainable: the base itself
    trains).
    weight_bytes: the base as stored (fp16: 2 N; int4 with group scales: about 0.55 N).
    attention_flops: FLOPs a token of the forward pass that no parameter counts (4 L T D for full attention, half
    causal).
    rematerialize: activations are recomputed in the backward pass.
    activation_bytes: what the backward pass keeps, per step.
    """

    base_params: float
    trainable_params: float
    weight_bytes: float
    attention_flops: float = 0.0
    rematerialize: bool = False
    activation_bytes: float = 0.0

    def __post_init__(self):
        special.require_positive(base_params=self.base_params, weight_bytes=self.weight_bytes)
        if self.trainable_params < 0:
            raise ValueError(f"trainable_params must be >= 0, got {self.trainable_params}")


def training_flops_per_token(work: Workload) -> float:
    """FLOPs of forward and backward for one token: 4 N (frozen base) + 6 n (trainable), or 6 N; + 2 (N + n) recomputed.

    The attention term is forward once, twice more in the backward pass, once more when recomputed.
    """
    if work.trainable_params:
        flops = 4.0 * work.base_params + 6.0 * work.trainable_params
    else:
        flops = 6.0 * work.base_params
    forward = 2.0 * (work.base_params + work.trainable_params) + work.attention_flops
    return flops + 3.0 * work.attention_flops + (forward if work.rematerialize else 0.0)


def training_memory_bytes(work: Workload, optimizer_slots: int = 2) -> float:
    """Weights as stored, fp32 master copy, gradient and optimizer slots of what trains, and activations."""
    trained = work.trainable_params or work.base_params
    return work.weight_bytes + 4.0 * (2 + optimizer_slots) * trained + work.activation_bytes


def inference_memory_bytes(work: Workload) -> float:
    """Weights as stored plus the PEFT modules in fp16: what it takes to hold the model at all."""
    return work.weight_bytes + 2.0 * work.trainable_params


def fits(devices: Devices, memory_bytes):
    """[C] bool: which devices can hold a job of memory_bytes (scalar or [C])."""
    return memory_bytes <= devices.memory_bytes


def training_time_s(devices: Devices, work: Workload, tokens_per_step, num_steps):
    """Roofline of a training step, times steps: the larger of FLOPs at the sustained rate and the weights' traffic.

    The weights are read once forward, once backward, once more when recomputed.

    Args:
      tokens_per_step, num_steps: scalars or [C].

    Returns:
      [C] s.
    """
    arithmetic = training_flops_per_token(work) * tokens_per_step / devices.flops
    traffic = (3.0 if work.rematerialize else 2.0) * work.weight_bytes / devices.memory_bandwidth_bytes_s
    return num_steps * jnp.maximum(arithmetic, traffic)


def forward_time_s(devices: Devices, work: Workload, tokens):
    """Roofline of one forward pass over `tokens` tokens, [C] s."""
    flops = 2.0 * (work.base_params + work.trainable_params) + work.attention_flops
    return jnp.maximum(flops * tokens / devices.flops, work.weight_bytes / devices.memory_bandwidth_bytes_s)


def active_energy_j(devices: Devices, time_s):
    """Energy of running for time_s [C] at the device's active power."""
    return devices.active_power_w * time_s
