"""The loss on the way into a building or a car: 3GPP TR 38.901, section 7.4.3, for UMi and UMa.

PL = PL_b + PL_tw + PL_in + N(0, sigma_P^2) indoors, PL_b + N(9, 5^2) in a car without metallized windows. Constants of
Releases 14 to 18; Release 19 has 25.4 + 0.11 f for coated glass.
"""

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("none", "o2i_low", "o2i_high", "car")
# Table 7.5-6, column O2I, of UMi and of UMa: the shadow fading of an indoor client and its correlation distance.
INDOOR_SHADOWING_DB = 7.0
INDOOR_CORRELATION_M = 7.0
# Section 7.4.3.1 for UMi and UMa: the indoor distance is the smaller of two uniform draws up to this.
MAX_INDOOR_M = 25.0
# Table 7.4.3-2: share of glass, sigma_P in dB.
_GLASS = {"o2i_low": (0.3, 4.4), "o2i_high": (0.7, 6.5)}
_CAR_MEAN_DB, _CAR_STD_DB = 9.0, 5.0


def is_indoor(kind: str) -> bool:
    """Whether clients are inside buildings."""
    return kind in _GLASS


def wall_loss_db(kind: str, fc_ghz: float) -> float:
    """PL_tw, dB, of "o2i_low" (plain glass and concrete) or "o2i_high" (coated glass), Tables 7.4.3-1 and 7.4.3-2."""
    glass_db = 2.0 + 0.2 * fc_ghz if kind == "o2i_low" else 23.0 + 0.3 * fc_ghz
    concrete_db = 5.0 + 4.0 * fc_ghz
    share, _ = _GLASS[kind]
    return 5.0 - 10.0 * float(
        np.log10(share * 10.0 ** (-glass_db / 10.0) + (1.0 - share) * 10.0 ** (-concrete_db / 10.0))
    )


def draw_indoor_m(key, num_users: int):
    """How far behind the wall each user is, [C] m."""
    return MAX_INDOOR_M * jnp.min(jax.random.uniform(key, (num_users, 2)), axis=1)


def penetration_db(kind: str, fc_ghz: float, indoor_m, draw):
    """The loss of each user, dB.

    Args:
      kind: one of KINDS.
      fc_ghz: carrier frequency.
      indoor_m: [C] m behind the wall; used by the two O2I kinds.
      draw: [C] standard normal.

    Returns:
      [C].
    """
    if kind == "none":
        return jnp.zeros_like(draw)
    if kind == "car":
        return _CAR_MEAN_DB + _CAR_STD_DB * draw
    return wall_loss_db(kind, fc_ghz) + 0.5 * indoor_m + _GLASS[kind][1] * draw
