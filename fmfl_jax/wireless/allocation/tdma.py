"""The joint energy-time problem of Tran et al., "Federated Learning over Wireless Networks: Optimization Model Design
and Analysis", IEEE INFOCOM 2019: users compute, then upload one after another.

min over f, tau, theta of K(theta) [E_com + log(1/theta) E_cmp + price (T_com + log(1/theta) T_cmp)], K = 1/(1 - theta).
Their SUB1 (frequencies), SUB2 (upload times) and SUB3 (local accuracy theta) separate; each is solved exactly here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fmfl_jax.wireless import special
from fmfl_jax.wireless.allocation import fdma


class Compute(NamedTuple):
    """time_s [] of the slowest user, frequency_hz [C], energy_j [C]."""

    time_s: jax.Array
    frequency_hz: jax.Array
    energy_j: jax.Array


def frequencies(cycles, min_hz, max_hz, kappa, price_w) -> Compute:
    """SUB1: min sum kappa c f^2 + price T with c/f <= T. At the optimum f = clip(c/T, f_min, f_max).

    Args:
      cycles: c = C D, [C].
      min_hz, max_hz: scalars or [C].
      kappa: effective switched capacitance (Tran's alpha/2), J s^2.
      price_w: joules that a second is worth, > 0.
    """
    special.require_positive(kappa=kappa, price_w=price_w, max_hz=max_hz)
    # Work in units of the largest job: (1e9 cycles)^3 would strain float32.
    unit = jnp.max(cycles)
    work = cycles / unit
    low_limit = jnp.max(cycles / max_hz)
    free = cycles / min_hz  # T beyond which a user idles at f_min
    high_limit = jnp.maximum(jnp.max(free), low_limit)
    # log(2 kappa c^3 / (T^3 price)) summed over users still above f_min
    log_scale = jnp.log(2.0 * kappa * unit / price_w * jnp.square(unit))

    def residual(log_t):
        above = free > jnp.exp(log_t)
        total = jnp.sum(jnp.where(above, work**3, 0.0))
        value = jnp.log(jnp.maximum(total, 1e-30)) + log_scale - 3.0 * log_t
        return value, jnp.full_like(value, -3.0)

    low, high = jnp.log(low_limit), jnp.log(high_limit)
    bound = residual(low)[0] <= 0.0  # already too slow a price: run at the limit of the slowest
    root = fdma.solve_decreasing(lambda s: fdma._unless(~bound, residual(s)), 0.5 * (low + high), low, high)
    time_s = jnp.where(bound, low_limit, jnp.exp(root))
    frequency = jnp.clip(cycles / time_s, min_hz, max_hz)
    return Compute(time_s, frequency, kappa * cycles * jnp.square(frequency))


class Upload(NamedTuple):
    """time_s [C] on the air each, power_w [C], energy_j [C]."""

    time_s: jax.Array
    power_w: jax.Array
    energy_j: jax.Array


def upload_times(payload_bits, bandwidth_hz, noise_to_gain_w, min_power_w, max_power_w, price_w) -> Upload:
    """SUB2: min sum tau (p(tau) + price), tau = S / (B (1 + W0((price g/N - 1)/e))), clipped to the power limits.

    Args:
      payload_bits: [C] (Tran et al. count nats: divide by ln 2).
      bandwidth_hz: B, scalar.
      noise_to_gain_w: [C], total noise power over power gain, W: the power of SNR 1.
      min_power_w, max_power_w: limits; the time is clipped to what they allow.
      price_w: joules a second is worth.
    """
    special.require_positive(bandwidth_hz=bandwidth_hz, max_power_w=max_power_w)
    nats = payload_bits * fdma.LN2
    z = special.one_plus_w0(price_w / noise_to_gain_w)
    z = jnp.clip(z, jnp.log1p(min_power_w / noise_to_gain_w), jnp.log1p(max_power_w / noise_to_gain_w))
    time_s = nats / (bandwidth_hz * z)
    power = noise_to_gain_w * jnp.expm1(z)
    return Upload(time_s, power, power * time_s)


def local_accuracy(communication_cost, compute_cost):
    """SUB3: theta in (0, 1) that minimizes (a - b log theta)/(1 - theta): 1/theta + log theta = 1 + a/b, by W_-1.

    With 1/theta = 1 + q the equation is q - log(1 + q) = a/b, that is 1 + q = -W_-1(-e^(-1 - a/b)); solved in q, since
    -e^(-1-r) rounds to the branch point for small r.
    """
    ratio = communication_cost / compute_cost
    root = jnp.sqrt(2.0 * ratio)
    q = ratio + root + jnp.log1p(ratio) * 0.5
    for _ in range(8):
        q = q - (q - jnp.log1p(q) - ratio) * (1.0 + q) / q
    return 1.0 / (1.0 + q)


class JointPlan(NamedTuple):
    """The solution of the joint problem: compute, upload, theta, objective (scalars beyond the two)."""

    compute: Compute
    upload: Upload
    theta: jax.Array
    objective: jax.Array


def joint_energy_time(
    cycles, min_hz, max_hz, kappa, payload_bits, bandwidth_hz, noise_to_gain_w, min_power_w, max_power_w, price_w
) -> JointPlan:
    """All three subproblems; arguments as in `frequencies` and `upload_times`. A full local pass costs log(1/theta)."""
    compute = frequencies(cycles, min_hz, max_hz, kappa, price_w)
    upload = upload_times(payload_bits, bandwidth_hz, noise_to_gain_w, min_power_w, max_power_w, price_w)
    communication_cost = jnp.sum(upload.energy_j) + price_w * jnp.sum(upload.time_s)
    compute_cost = jnp.sum(compute.energy_j) + price_w * compute.time_s
    theta = local_accuracy(communication_cost, compute_cost)
    objective = (communication_cost - compute_cost * jnp.log(theta)) / (1.0 - theta)
    return JointPlan(compute, upload, theta, objective)
