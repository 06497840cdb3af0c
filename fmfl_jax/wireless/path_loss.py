"""Path loss and line of sight: a log-distance law, and 3GPP TR 38.901 (Table 7.4.1-1, 7.4.2-1) UMi and UMa.

Distances are horizontal (d2D), in m, any shape; losses in dB. TR 38.901's effective environment height is 1 m.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

SPEED_OF_LIGHT_MPS = 299792458.0


class Scenario(NamedTuple):
    """Constants of a TR 38.901 scenario (Tables 7.4.1-1, 7.4.2-1, 7.5-6): heights m, deviations dB, distances m."""

    bs_height_m: float
    los_decay_m: float
    shadow_los_db: float
    shadow_nlos_db: float
    correlation_los_m: float
    correlation_nlos_m: float
    rician_mean_db: float
    rician_std_db: float


UMI = Scenario(10.0, 36.0, 4.0, 7.82, 10.0, 13.0, 9.0, 5.0)
UMA = Scenario(25.0, 63.0, 4.0, 6.0, 37.0, 50.0, 9.0, 3.5)
# LOS is decided by a spatially consistent uniform field with this correlation distance (TR 38.901 Table 7.6.3.1-2).
LOS_CORRELATION_M = 50.0


def log_distance_db(distance_m, intercept_db: float = 15.3, slope_db: float = 37.6):
    """intercept + slope log10(d / 1 m), dB; distances below 1 m count as 1 m, so that d = 0 is finite.

    The defaults are the classic 128.1 + 37.6 log10(d / 1 km). Free distance power laws d^-n: intercept 0, slope 10 n.
    """
    return intercept_db + slope_db * jnp.log10(jnp.maximum(distance_m, 1.0))


def _two_slope(distance_m, fc_ghz, bs_height_m, ut_height_m, intercept, near_slope, far_correction):
    dh = bs_height_m - ut_height_m
    d3 = jnp.sqrt(jnp.square(distance_m) + dh * dh)
    breakpoint_m = 4.0 * (bs_height_m - 1.0) * (ut_height_m - 1.0) * fc_ghz * 1e9 / SPEED_OF_LIGHT_MPS
    base = intercept + 20.0 * np.log10(fc_ghz)
    near = base + near_slope * jnp.log10(d3)
    far = base + 40.0 * jnp.log10(d3) - far_correction * np.log10(breakpoint_m**2 + dh * dh)
    return jnp.where(distance_m < breakpoint_m, near, far), d3


def umi_db(distance_m, los, *, fc_ghz: float, bs_height_m: float = 10.0, ut_height_m: float = 1.5):
    """UMi street canyon. Args: d2D [C] m; los: bool [C]. Returns [C] dB. Valid 10 m to 5 km, finite at 0."""
    los_db, d3 = _two_slope(distance_m, fc_ghz, bs_height_m, ut_height_m, 32.4, 21.0, 9.5)
    nlos_db = 22.4 + 35.3 * jnp.log10(d3) + 21.3 * np.log10(fc_ghz) - 0.3 * (ut_height_m - 1.5)
    return jnp.where(los, los_db, jnp.maximum(los_db, nlos_db))


def uma_db(distance_m, los, *, fc_ghz: float, bs_height_m: float = 25.0, ut_height_m: float = 1.5):
    """UMa. Args: d2D [C] m; los: bool [C]. Returns [C] dB. Valid 10 m to 5 km, h_UT < 13 m, finite at 0."""
    los_db, d3 = _two_slope(distance_m, fc_ghz, bs_height_m, ut_height_m, 28.0, 22.0, 9.0)
    nlos_db = 13.54 + 39.08 * jnp.log10(d3) + 20.0 * np.log10(fc_ghz) - 0.6 * (ut_height_m - 1.5)
    return jnp.where(los, los_db, jnp.maximum(los_db, nlos_db))


def los_probability(distance_m, decay_m: float):
    """18/d + exp(-d/decay)(1 - 18/d) beyond 18 m, 1 nearer; decay 36 m (UMi) or 63 m (UMa, h_UT <= 13 m). [C] ->
    [C]."""
    near = 18.0 / jnp.maximum(distance_m, 18.0)
    return near + jnp.exp(-distance_m / decay_m) * (1.0 - near)
