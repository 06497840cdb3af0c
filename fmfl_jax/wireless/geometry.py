"""Where the users are: cells, drops and mobility (static, random waypoint, Gauss-Markov). Positions are [C, 2] in m.

A cell is centred on its base station at (0, 0). Cells of a network are independent copies.
Random waypoint: Johnson and Maltz 1996. Gauss-Markov: Liang and Haas, IEEE/ACM ToN 2003, here as the exact
Ornstein-Uhlenbeck step, so that a round of any length is one step.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CELL_SHAPES = ("disk", "square", "hexagon")
MOBILITY_MODELS = ("static", "random_waypoint", "gauss_markov")


class Motion(NamedTuple):
    """Position, velocity and waypoint of every user: each [C, 2], in m, m/s and m."""

    position_m: jax.Array
    velocity_mps: jax.Array
    waypoint_m: jax.Array


def drop_users(key, num_users: int, cell: str, cell_radius_m: float, min_distance_m: float = 0.0):
    """Users uniform in a cell.

    Args:
      key: PRNG key.
      num_users: C.
      cell: "disk" of radius R, "square" of side 2R, "hexagon" of circumradius R (base station in the middle).
      cell_radius_m: R, m.
      min_distance_m: users nearer than this to the base station are pushed out to it, along their direction.

    Returns:
      [C, 2] float positions in m.

    Raises:
      ValueError: on an unknown cell shape.
    """
    if cell == "disk":
        k_radius, k_angle = jax.random.split(key)
        low = (min_distance_m / cell_radius_m) ** 2
        radius = cell_radius_m * jnp.sqrt(jax.random.uniform(k_radius, (num_users,), minval=low))
        angle = jax.random.uniform(k_angle, (num_users,), maxval=2.0 * np.pi)
        return radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    if cell == "square":
        position = jax.random.uniform(key, (num_users, 2), minval=-cell_radius_m, maxval=cell_radius_m)
    elif cell == "hexagon":
        # A hexagon is three rhombi: pick one, then two coordinates along its two sides.
        k_rhombus, k_sides = jax.random.split(key)
        corners = np.stack([np.cos(np.arange(3) * 2 * np.pi / 3), np.sin(np.arange(3) * 2 * np.pi / 3)], axis=1)
        which = jax.random.randint(k_rhombus, (num_users,), 0, 3)
        sides = jax.random.uniform(k_sides, (num_users, 2, 1), maxval=cell_radius_m)
        corners = jnp.asarray(corners, dtype=sides.dtype)
        position = sides[:, 0] * corners[which] + sides[:, 1] * corners[(which + 1) % 3]
    else:
        raise ValueError(f"cell must be one of {CELL_SHAPES}, got {cell!r}")
    return push_out(position, min_distance_m)


def push_out(position_m, min_distance_m: float):
    """Moves users nearer than min_distance_m to that distance; one exactly at the centre goes along +x. [C, 2] -> [C,
    2]."""
    distance = jnp.sqrt(jnp.sum(jnp.square(position_m), axis=1))
    scale = jnp.maximum(1.0, min_distance_m / jnp.maximum(distance, 1e-9))
    east = jnp.zeros_like(position_m).at[:, 0].set(min_distance_m)
    return jnp.where((distance > 1e-9)[:, None], position_m * scale[:, None], east)


def contain(position_m, velocity_mps, cell: str, cell_radius_m: float):
    """Reflects users that left the cell back into it and turns their velocity. Returns (position, velocity), [C, 2]
    each.

    The hexagon is treated as its inscribed disk's reflection at the circumradius, so that users may stand in the sliver
    between hexagon and circle: a path-loss difference below 1.3 dB at the corner, accepted for a branch-free step.
    """
    if cell == "square":
        folded = jnp.mod(position_m + cell_radius_m, 4.0 * cell_radius_m)
        outside = folded > 2.0 * cell_radius_m
        inside = jnp.where(outside, 4.0 * cell_radius_m - folded, folded) - cell_radius_m
        return inside, jnp.where(outside, -velocity_mps, velocity_mps)
    distance = jnp.sqrt(jnp.sum(jnp.square(position_m), axis=1, keepdims=True))  # [C, 1]
    unit = position_m / jnp.maximum(distance, 1e-9)
    folded = jnp.mod(distance, 2.0 * cell_radius_m)
    folded = jnp.where(folded > cell_radius_m, 2.0 * cell_radius_m - folded, folded)
    outside = distance > cell_radius_m
    radial = jnp.sum(velocity_mps * unit, axis=1, keepdims=True)
    turned = velocity_mps - 2.0 * jnp.maximum(radial, 0.0) * unit
    return jnp.where(outside, folded * unit, position_m), jnp.where(outside, turned, velocity_mps)


def init_motion(key, position_m, mobility: str, speed_mps: float, cell: str, cell_radius_m: float) -> Motion:
    """A stationary start: directions uniform, waypoints uniform in the cell. Velocities are 0 when static."""
    k_direction, k_waypoint = jax.random.split(key)
    num_users = position_m.shape[0]
    if mobility == "static":
        return Motion(position_m, jnp.zeros_like(position_m), position_m)
    waypoint = drop_users(k_waypoint, num_users, cell, cell_radius_m)
    if mobility == "random_waypoint":
        towards = waypoint - position_m
        norm = jnp.sqrt(jnp.sum(jnp.square(towards), axis=1, keepdims=True))
        return Motion(position_m, speed_mps * towards / jnp.maximum(norm, 1e-9), waypoint)
    if mobility == "gauss_markov":
        # Each component N(0, v^2/2): the root-mean-square speed is speed_mps.
        velocity = jax.random.normal(k_direction, (num_users, 2)) * (speed_mps * np.sqrt(0.5))
        return Motion(position_m, velocity, waypoint)
    raise ValueError(f"mobility must be one of {MOBILITY_MODELS}, got {mobility!r}")


def gauss_markov_step(key, motion: Motion, dt_s, speed_mps: float, memory_s: float) -> Motion:
    """Exact step of the Ornstein-Uhlenbeck velocity dv = -v/tau dt + ..., integrated to positions, any dt >= 0
    (scalar).

    With a = exp(-dt/tau): v' = a v + e1, x' = x + tau (1 - a) v + e2, where (e1, e2) are jointly Gaussian with
    variances s^2 (1 - a^2) and s^2 tau^2 (2 dt/tau - 3 + 4a - a^2), covariance s^2 tau (1 - a)^2; s^2 = speed^2/2.
    """
    variance = 0.5 * speed_mps**2
    ratio = dt_s / memory_s
    one_minus_a = -jnp.expm1(-ratio)
    a = 1.0 - one_minus_a
    var_v = variance * one_minus_a * (1.0 + a)
    cov = variance * memory_s * one_minus_a**2
    # 2r - 3 + 4a - a^2 cancels to (2/3) r^3 for small r
    exact = 2.0 * ratio - 2.0 * one_minus_a - one_minus_a**2
    var_x = variance * memory_s**2 * jnp.where(ratio < 0.03, ratio**3 * (2.0 / 3.0 - 0.5 * ratio), exact)
    slope = jnp.where(var_v > 0.0, cov / jnp.where(var_v > 0.0, var_v, 1.0), 0.0)
    rest = jnp.sqrt(jnp.maximum(var_x - slope * cov, 0.0))
    n1, n2 = jax.random.normal(key, (2,) + motion.position_m.shape, motion.position_m.dtype)
    e1 = jnp.sqrt(var_v) * n1
    position = motion.position_m + memory_s * one_minus_a * motion.velocity_mps + slope * e1 + rest * n2
    return motion._replace(position_m=position, velocity_mps=a * motion.velocity_mps + e1)


def random_waypoint_step(key, motion: Motion, dt_s, speed_mps: float, cell: str, cell_radius_m: float) -> Motion:
    """Walks dt_s seconds at speed_mps, drawing a new waypoint whenever one is reached (no pause)."""
    dtype = motion.position_m.dtype
    left_m = jnp.full(motion.position_m.shape[:1], speed_mps, dtype) * jnp.asarray(dt_s, dtype)
    position, waypoint = _walk(motion.position_m, motion.waypoint_m, left_m, key, cell, cell_radius_m)
    towards = waypoint - position
    norm = jnp.sqrt(jnp.sum(jnp.square(towards), axis=1, keepdims=True))
    return Motion(position, speed_mps * towards / jnp.maximum(norm, 1e-9), waypoint)


@functools.partial(jax.jit, static_argnums=(4, 5))  # or the loop is compiled again at every call from outside jit
def _walk(position_m, waypoint_m, left_m, key, cell: str, cell_radius_m: float):
    """(positions, waypoints) [C, 2] after everybody walked left_m [C], m."""
    num_users, dtype = position_m.shape[0], position_m.dtype

    def walking(carry):
        return jnp.any(carry[2] > 0.0)

    def leg(carry):
        position, waypoint, left_m, key = carry
        key, k_next = jax.random.split(key)
        towards = waypoint - position
        length = jnp.sqrt(jnp.sum(jnp.square(towards), axis=1))
        arrives = left_m >= length
        fraction = jnp.where(arrives, 1.0, left_m / jnp.maximum(length, 1e-9))
        position = position + fraction[:, None] * towards
        fresh = drop_users(k_next, num_users, cell, cell_radius_m).astype(dtype)
        moving = left_m > 0.0
        waypoint = jnp.where((arrives & moving)[:, None], fresh, waypoint)
        return position, waypoint, jnp.where(arrives, left_m - length, 0.0), key

    return jax.lax.while_loop(walking, leg, (position_m, waypoint_m, left_m, key))[:2]


def move(
    key,
    motion: Motion,
    dt_s,
    *,
    mobility: str,
    speed_mps: float,
    memory_s: float,
    cell: str,
    cell_radius_m: float,
    min_distance_m: float,
) -> Motion:
    """Moves everyone by dt_s seconds (scalar) and keeps them in the cell and min_distance_m off the base station."""
    if mobility == "static":
        return motion
    if mobility == "random_waypoint":
        moved = random_waypoint_step(key, motion, dt_s, speed_mps, cell, cell_radius_m)
        return moved._replace(position_m=push_out(moved.position_m, min_distance_m))
    if mobility != "gauss_markov":
        raise ValueError(f"mobility must be one of {MOBILITY_MODELS}, got {mobility!r}")
    moved = gauss_markov_step(key, motion, dt_s, speed_mps, memory_s)
    position, velocity = contain(moved.position_m, moved.velocity_mps, cell, cell_radius_m)
    return moved._replace(position_m=push_out(position, min_distance_m), velocity_mps=velocity)
