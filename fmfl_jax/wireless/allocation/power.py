"""Power over parallel channels: water-filling (Cover and Thomas, Elements of Information Theory, section 9.4)."""

import jax.numpy as jnp


def water_fill(gain_to_noise, total_power_w):
    """Power over parallel channels that maximizes sum log(1 + p_n g_n): p_n = max(level - 1/g_n, 0), sum p_n = P.

    Args:
      gain_to_noise: [N], 1/W; 0 gets nothing.
      total_power_w: scalar, >= 0.

    Returns:
      [N] W, all 0 if every gain is. Exact by sorting, O(N log N).
    """
    floor = 1.0 / jnp.maximum(gain_to_noise, 1e-30)
    # Heights above the lowest floor: a little power over high floors would drown in their rounding.
    height = floor - jnp.min(floor)
    ordered = jnp.sort(height)
    count = jnp.arange(1, floor.shape[0] + 1, dtype=floor.dtype)
    level = (total_power_w + jnp.cumsum(ordered)) / count
    # The number in use is the largest n whose level still covers its own floor.
    used = jnp.maximum(jnp.sum((level > ordered).astype(jnp.int32)) - 1, 0)
    return jnp.where(gain_to_noise > 0.0, jnp.maximum(level[used] - height, 0.0), 0.0)
