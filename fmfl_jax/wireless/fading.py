"""Shadowing that is correlated in space, and block fading that is correlated in time.

Gudmundson 1991: shadowing has autocorrelation exp(-distance / d_c). Here it is a random field over the plane (a sum of
plane waves), so that neighbours share it, a user who moves stays consistent, and memory is linear in users.
Small scale: h = sqrt(K/(K+1)) e^{j phi} + sqrt(1/(K+1)) CN(0,1); AR(1) in time with rho = J0(2 pi f_d T) (Jakes).
Complex gains are kept as (real, imaginary) pairs of real arrays: what a plain matrix product can advance.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.wireless import path_loss, special


class Field(NamedTuple):
    """A standard Gaussian field of unit correlation distance: wave vectors [W, 2] (rad), phases [W] (rad)."""

    wave: jax.Array
    phase: jax.Array


def init_field(key, num_waves: int = 32) -> Field:
    """Plane waves whose ensemble autocorrelation is exp(-d) at distance d (in correlation distances).

    The spectrum of exp(-d) in the plane has radial distribution F(k) = 1 - (1 + k^2)^{-1/2}, inverted in closed form.
    Directions are stratified, which only lowers the variance between fields.
    """
    k_radius, k_angle, k_phase = jax.random.split(key, 3)
    u = jax.random.uniform(k_radius, (num_waves,), minval=0.0, maxval=1.0 - 1e-4)
    radius = jnp.sqrt(jnp.maximum(1.0 / jnp.square(1.0 - u) - 1.0, 0.0))
    spread = jnp.arange(num_waves, dtype=u.dtype) / num_waves
    angle = 2.0 * np.pi * (spread + jax.random.uniform(k_angle, ()))
    phase = jax.random.uniform(k_phase, (num_waves,), maxval=2.0 * np.pi)
    return Field(radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1), phase)


def field_at(field: Field, position_m, correlation_m):
    """Values [C] of the field at positions [C, 2]; correlation_m: [C] or scalar, m. Mean 0 and variance 1 over
    fields."""
    x = position_m[:, 0] / correlation_m
    y = position_m[:, 1] / correlation_m
    return _wave_sum(field, x, y) * np.sqrt(2.0 / field.phase.shape[0])


@jax.jit  # or the scan is compiled again at every call from outside jit, since its body is a new closure each time
def _wave_sum(field: Field, x, y):
    """sum_w cos(x k_w[0] + y k_w[1] + phase_w), [C]."""

    def add(total, wave_and_phase):
        wave, phase = wave_and_phase
        return total + jnp.cos(x * wave[0] + y * wave[1] + phase), None

    # A scan over waves, not a [C, W] array: a million users stay at a few [C] arrays.
    return jax.lax.scan(add, jnp.zeros_like(x), (field.wave, field.phase))[0]


def doppler_hz(speed_mps, fc_ghz):
    """Maximum Doppler shift v fc / c, Hz."""
    return speed_mps * fc_ghz * 1e9 / path_loss.SPEED_OF_LIGHT_MPS


def time_correlation(doppler, interval_s):
    """rho = J0(2 pi f_d T) between blocks T seconds apart (Jakes/Clarke)."""
    return special.bessel_j0(2.0 * np.pi * jnp.asarray(doppler) * interval_s)


def scatter_init(key, shape):
    """CN(0, 1) as [2, *shape] real and imaginary parts of variance 1/2 each."""
    return jax.random.normal(key, (2,) + tuple(shape)) * np.sqrt(0.5)


def scatter_kernel(rho, num_slots: int):
    """The AR(1) recurrence over num_slots steps as one matrix product, so that time is vectorized too.

    Args:
      rho: scalar correlation of neighbouring slots.
      num_slots: L.

    Returns:
      (carry [L], kernel [L, L]): h = h_0 carry[None] + w @ kernel gives slots 1..L from the last h_0 and white CN w.
    """
    rho = jnp.asarray(rho)
    steps = jnp.arange(num_slots)
    lag = steps[None, :] - steps[:, None]
    # Integer powers by repeated multiplication: rho may be negative or 0.
    powers = jnp.concatenate([jnp.ones((1,), rho.dtype), jnp.cumprod(jnp.full((num_slots,), rho))])
    kernel = jnp.where(lag >= 0, powers[jnp.maximum(lag, 0)], 0.0) * jnp.sqrt(1.0 - rho * rho)
    return powers[1:], kernel


def scatter_chunk(key, scatter, carry, kernel):
    """The next L slots of the AR(1) process: scatter [2, C] -> [2, C, L], with `scatter_kernel`'s pair."""
    white = scatter_init(key, (scatter.shape[1], kernel.shape[0]))  # [2, C, L]
    return scatter[:, :, None] * carry[None, None, :] + white @ kernel


def power_gain(scatter, rician_k, phase):
    """|h|^2, mean 1.

    Args:
      scatter: [2, *S] CN(0, 1).
      rician_k: linear K factor, broadcastable to S; 0 is Rayleigh.
      phase: phase of the specular part, rad, broadcastable to S.

    Returns:
      S.
    """
    specular = jnp.sqrt(rician_k / (rician_k + 1.0))
    diffuse = jnp.sqrt(1.0 / (rician_k + 1.0))
    real = specular * jnp.cos(phase) + diffuse * scatter[0]
    imaginary = specular * jnp.sin(phase) + diffuse * scatter[1]
    return real * real + imaginary * imaginary
