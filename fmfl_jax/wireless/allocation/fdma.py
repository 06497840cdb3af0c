"""Bandwidth among users who transmit at the same time: for a rate, for the shortest round, for the least energy.

The problems of Chen et al. (IEEE TWC 2021) and Yang et al. (IEEE TWC 2021), solved by one scalar root each. The link
enters as cn0_hz = P g / (N0 gap), the SNR at 1 Hz; a rate R needs c = R ln2 / cn0 < 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.wireless import special

LN2 = float(np.log(2.0))


def solve_decreasing(residual, start, low, high, max_iterations: int = 80):
    """Root of a decreasing scalar function: Newton, kept inside a shrinking bracket (bisection where Newton leaves it).

    Args:
      residual: s -> (f(s), f'(s)), scalars.
      start, low, high: scalars with f(low) >= 0 >= f(high).

    Returns:
      s with |f(s)| within a few ulp, or the bracket at rounding level.
    """
    eps = jnp.finfo(jnp.asarray(start).dtype).eps

    def unfinished(carry):
        _, _, _, (f, _), iteration = carry
        return (jnp.abs(f) > 4.0 * eps) & (iteration < max_iterations)

    def step(carry):
        s, low, high, (f, slope), iteration = carry
        low = jnp.where((f > 0.0) & (iteration > 0), s, low)
        high = jnp.where((f > 0.0) | (iteration == 0), high, s)
        newton = s - f / jnp.where(slope < 0.0, slope, -1.0)
        inside = (newton > low) & (newton < high) & (slope < 0.0)
        s = jnp.where(inside, newton, jnp.where(iteration == 0, s, 0.5 * (low + high)))
        return s, low, high, residual(s), iteration + 1

    # The first pass only evaluates the start, so that the residual is traced and compiled once.
    first = (jnp.full_like(start, jnp.inf), jnp.full_like(start, -jnp.inf))
    begun = (start, low, high, first, jnp.int32(0))
    return jax.lax.while_loop(unfinished, step, begun)[0]


def bandwidth_for_rate(rate_bps, cn0_hz, max_efficiency: float = np.inf):
    """The smallest bandwidth that carries a rate: b = -R ln2 / (W_-1(-c e^-c) + c), c = R ln2 / cn0.

    Args:
      rate_bps: R, bit/s, any shape.
      cn0_hz: P g / N0, Hz, broadcastable.
      max_efficiency: bit/s/Hz that no SNR exceeds (the highest modulation and coding).

    Returns:
      Hz; inf where c >= 1 (no bandwidth is enough), 0 where the rate is 0.
    """
    needed = rate_bps * LN2
    active = needed > 0.0
    ratio = cn0_hz / jnp.where(active, needed, 1.0)
    nats, _ = special.efficiency_for_energy_ratio(jnp.log(jnp.maximum(ratio, 1e-30)))
    nats = jnp.minimum(nats, max_efficiency * LN2)
    bandwidth = jnp.where(nats > 0.0, needed / jnp.where(nats > 0.0, nats, 1.0), jnp.inf)
    return jnp.where(active, bandwidth, 0.0)


def admit_most(
    payload_bits,
    cn0_hz,
    bandwidth_hz,
    time_s,
    max_bandwidth_hz: jax.Array | float = np.inf,
    block_hz: float | None = None,
    max_efficiency: float = np.inf,
):
    """The most users who can upload at the same time, each within its own time: those who need the least bandwidth.

    Args:
      payload_bits, cn0_hz, time_s: [C]; time_s <= 0 or an infeasible rate is left out. Payload 0 means "does not take
      part".
      bandwidth_hz: B, scalar.
      max_bandwidth_hz: [C] or scalar, the most a user can make use of.
      block_hz: bandwidth comes in whole blocks of this size; None for any amount.
      max_efficiency: bit/s/Hz, as in `bandwidth_for_rate`.

    Returns:
      [C] bool.
    """
    wants = (payload_bits > 0.0) & (time_s > 0.0)
    need = bandwidth_for_rate(payload_bits / jnp.where(wants, time_s, 1.0), cn0_hz, max_efficiency)
    if block_hz is not None:
        need = jnp.maximum(jnp.ceil(need / block_hz), 1.0) * block_hz
    need = jnp.where(wants & (need <= max_bandwidth_hz), need, jnp.inf)
    order = jnp.argsort(need)
    fits = jnp.cumsum(need[order]) <= bandwidth_hz * (1.0 + 1e-6)
    return jnp.zeros(need.shape, bool).at[order].set(fits)


class MinMaxTime(NamedTuple):
    """time_s: [] when the last upload ends; bandwidth_hz: [C], summing to the band over the users who send."""

    time_s: jax.Array
    bandwidth_hz: jax.Array


def min_max_time(payload_bits, cn0_hz, bandwidth_hz, ready_s=None, max_efficiency: float = np.inf) -> MinMaxTime:
    """Splits a band so that the last upload ends as early as possible: every user ends at T with sum b_k(T) = B.

    Args:
      payload_bits: [C]; 0 takes no part.
      cn0_hz: [C], P g / N0, Hz; must be > 0 where the payload is (users at 0 are left out: they cannot be served).
      bandwidth_hz: scalar B.
      ready_s: [C] when each user can start (after its compute), 0 if None.
      max_efficiency: bit/s/Hz, as in `bandwidth_for_rate`.

    Returns:
      MinMaxTime; time 0 if nobody sends.
    """
    special.require_positive(bandwidth_hz=bandwidth_hz)
    dtype = jnp.result_type(payload_bits, cn0_hz)
    ready = jnp.zeros_like(cn0_hz) if ready_s is None else ready_s
    active = (payload_bits > 0.0) & (cn0_hz > 0.0)
    any_active = jnp.any(active)
    log_band = jnp.log(jnp.asarray(bandwidth_hz, dtype))
    shortest = jnp.where(active, payload_bits * LN2 / jnp.where(active, cn0_hz, 1.0), 1.0)  # at infinite bandwidth
    earliest = jnp.max(jnp.where(active, ready + shortest, -jnp.inf))
    earliest = jnp.where(any_active, earliest, 0.0)
    slack = jnp.where(active, earliest - (ready + shortest), 0.0)

    def bandwidths(s):
        # T = earliest + e^s: exact differences for the user who is at its power limit.
        extra = jnp.maximum(slack, 0.0) + jnp.exp(s)
        nats, dnats = special.efficiency_for_energy_ratio(jnp.log1p(extra / shortest))
        dnats = jnp.where(nats < max_efficiency * LN2, dnats, 0.0)
        nats = jnp.minimum(nats, max_efficiency * LN2)
        duration = shortest + extra
        b = jnp.where(active, payload_bits * LN2 / (duration * jnp.where(nats > 0.0, nats, 1.0)), 0.0)
        return b, -b * jnp.exp(s) / duration * (1.0 + dnats / jnp.where(nats > 0.0, nats, 1.0))

    def residual(s):
        b, db = bandwidths(s)
        total = jnp.sum(b)
        return jnp.log(total) - log_band, jnp.sum(db) / total

    count = jnp.maximum(jnp.sum(active.astype(dtype)), 1.0)
    share = jnp.asarray(bandwidth_hz, dtype) / count
    equal_rate = share * jnp.minimum(jnp.log1p(cn0_hz / share) / LN2, max_efficiency)
    equal_end = jnp.max(jnp.where(active, ready + payload_bits / jnp.where(active, equal_rate, 1.0), 0.0))
    # The equal split ends no earlier than the optimum; rounding can blur a bracket that is tight, hence the margin.
    high = jnp.log(jnp.maximum(equal_end - earliest, 1e-6 * earliest)) + 0.01
    high = jnp.where(any_active, high, 0.0)
    s = solve_decreasing(lambda s: _unless(any_active, residual(s)), high - 0.02, high - 50.0, high)
    b, _ = bandwidths(s)
    return MinMaxTime(jnp.where(any_active, earliest + jnp.exp(s), 0.0), b)


def _unless(condition, pair):
    """(f, f') where the condition holds, else a finished root."""
    return jnp.where(condition, pair[0], 0.0), jnp.where(condition, pair[1], -1.0)


class MinEnergy(NamedTuple):
    """bandwidth_hz, power_w, energy_j: [C]; feasible: [] bool, False if the power limits need more than the band."""

    bandwidth_hz: jax.Array
    power_w: jax.Array
    energy_j: jax.Array
    feasible: jax.Array


def _log_slope(z):
    """log((z - 1) e^z + 1): the log of the marginal energy of bandwidth at z nats/s/Hz."""
    small = 2.0 * jnp.log(z) + jnp.log(0.5 + z * (1 / 3 + z * (1 / 8 + z * (1 / 30 + z / 144))))
    return jnp.where(z < 0.1, small, z + jnp.log(z + jnp.expm1(-z)))


def min_energy(payload_bits, time_s, gain_to_noise, bandwidth_hz, max_power_w=None) -> MinEnergy:
    """Least transmit energy for fixed upload times: b = s ln2 / (t y), y = 1 + W0((mu g/(N0 t) - 1)/e), sum b = B.

    E_k = t N0 b / g (2^(s/(t b)) - 1) falls with b; at the optimum all users have the same marginal energy mu, unless
    their power limit needs more bandwidth than that. Solved in float64 whatever the inputs are: at z nats/s/Hz a
    rounding of the band counts z times in the energy, which would cost float32 a digit or two.

    Args:
      payload_bits: s, [C]; 0 takes no part.
      time_s: t, [C], > 0.
      gain_to_noise: g / N0, [C], Hz per W.
      bandwidth_hz: B, scalar.
      max_power_w: scalar or [C]; no limit if None.

    Returns:
      MinEnergy, in the inputs' dtype. Where infeasible, bandwidths are the needed ones (their sum exceeds B).
    """
    special.require_positive(bandwidth_hz=bandwidth_hz)
    dtype = jnp.result_type(payload_bits, time_s, gain_to_noise)
    arguments = (payload_bits, time_s, gain_to_noise, bandwidth_hz, max_power_w)
    arguments = jax.tree.map(lambda a: jnp.asarray(a, dtype), arguments)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jax.lax.convert_element_type(a, jnp.float64), arguments)
        best = _min_energy(*wide)
        bandwidth_hz, power_w, energy_j = (jax.lax.convert_element_type(a, dtype) for a in best[:3])
    return MinEnergy(bandwidth_hz, power_w, energy_j, best.feasible)


def _min_energy(payload_bits, time_s, gain_to_noise, bandwidth_hz, max_power_w) -> MinEnergy:
    dtype = jnp.result_type(payload_bits, time_s, gain_to_noise)
    active = (payload_bits > 0.0) & (time_s > 0.0) & (gain_to_noise > 0.0)
    t = jnp.where(active, time_s, 1.0)
    nats = jnp.where(active, payload_bits, 1.0) * LN2 / t  # s ln2 / t, nat/s
    gnr = jnp.where(active, gain_to_noise, 1.0)
    log_price = jnp.log(t) - jnp.log(gnr)  # mu = a(z) t N0 / g
    if max_power_w is None:
        z_max = jnp.full(nats.shape, 80.0, dtype)
    else:
        z_max, _ = special.efficiency_for_energy_ratio(jnp.log(jnp.maximum(max_power_w * gnr / nats, 1e-30)))
        z_max = jnp.minimum(z_max, 80.0)
    band = jnp.asarray(bandwidth_hz, dtype)
    unserved = z_max <= 0.0  # beyond the wideband limit of the user's power
    least = jnp.where(active, nats / jnp.where(unserved, 1.0, z_max), 0.0)
    feasible = (jnp.sum(least) <= band) & ~jnp.any(active & unserved)

    def bandwidths(log_mu):
        log_a = jnp.minimum(log_mu - log_price, 80.0)
        z = special.one_plus_w0(jnp.exp(log_a))
        b = jnp.where(active, nats / z, 0.0)
        # d log z / d log mu = a / (z^2 e^z)
        db = -b * jnp.exp(log_a - z) / jnp.square(z)
        return jnp.maximum(b, least), jnp.where(b > least, db, 0.0)

    def residual(log_mu):
        b, db = bandwidths(log_mu)
        total = jnp.sum(b)
        pair = jnp.log(total) - jnp.log(band), jnp.sum(db) / total
        return _unless(feasible & jnp.any(active), pair)

    count = jnp.maximum(jnp.sum(active.astype(dtype)), 1.0)
    z_equal = jnp.minimum(nats * count / band, 80.0)
    level_equal = jnp.where(active, log_price + _log_slope(z_equal), jnp.inf)
    level_limit = jnp.where(active & ~unserved, log_price + _log_slope(jnp.where(unserved, 1.0, z_max)), -jnp.inf)
    level_equal_high = jnp.where(active, level_equal, -jnp.inf)
    low = jnp.where(jnp.any(active), jnp.min(level_equal), 0.0) - 0.01
    high = jnp.maximum(jnp.max(level_equal_high), jnp.max(level_limit)) + 0.01
    high = jnp.where(jnp.isfinite(high), jnp.maximum(high, low), low)
    log_mu = solve_decreasing(residual, 0.5 * (low + high), low, high)
    b, _ = bandwidths(log_mu)
    b = jnp.where(feasible, b, least)
    safe = jnp.where(b > 0.0, b, 1.0)
    power = jnp.where(b > 0.0, safe / gnr * jnp.expm1(jnp.minimum(nats / safe, 80.0)), 0.0)
    if max_power_w is not None:
        power = jnp.minimum(power, max_power_w)  # where infeasible: what the user would do, not enough
    return MinEnergy(b, power, power * jnp.where(active, t, 0.0), feasible)
