"""Units and special functions that JAX does not have: Bessel's J0, e^x E1, and the roots that bandwidth needs.

The allocation problems are usually written with Lambert's W (Corless et al., Adv. Comput. Math. 1996), which cancels
digits near its branch point; `efficiency_for_energy_ratio` and `one_plus_w0` solve the same equations in variables that
stay accurate in float32.
"""

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def require_positive(**values):
    """Raises ValueError if a concrete value is not > 0 (NaN included). Traced values pass: inside jit they show as
    outage."""
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):
            continue
        array = np.asarray(value)
        if not np.all(array > 0):
            raise ValueError(f"{name} must be positive, got {array.min() if array.size else 'an empty array'}")


def db_to_linear(value_db):
    """10^(x/10), any shape."""
    return jnp.exp(jnp.asarray(value_db) * (np.log(10.0) / 10.0))


def linear_to_db(value):
    """10 log10(x), any shape; 0 gives -inf."""
    return 10.0 * jnp.log10(value)


def dbm_to_watt(value_dbm):
    """dBm to W, any shape."""
    return db_to_linear(jnp.asarray(value_dbm) - 30.0)


def one_plus_w0(a):
    """y >= 0 with (y - 1) e^y + 1 = a, that is y = 1 + W0((a - 1)/e), for a >= 0; elementwise, accurate as a -> 0.

    This is the optimal nats per symbol when the marginal energy of bandwidth or time is a (rows 3 and 4 of the
    allocation table in the facts: min-energy FDMA, and Tran et al., INFOCOM 2019, eq. for tau).
    """
    a = jnp.asarray(a)
    log_a = jnp.log(jnp.maximum(a, 1.0))
    y = jnp.where(a < 1.5, jnp.sqrt(2.0 * a) / (1.0 + 0.3 * jnp.sqrt(a)), 1.0 + log_a - jnp.log1p(0.7 * log_a))

    def halley(_, y):
        # f(y) = y e^y - expm1(y) loses digits for small y, where its series is exact: sum_n y^n / (n (n-2)!)
        series = y * y * (0.5 + y * (1 / 3 + y * (1 / 8 + y * (1 / 30 + y * (1 / 144 + y * (1 / 840 + y / 5760))))))
        e = jnp.exp(y)
        f = jnp.where(y < 0.3, series, y * e - jnp.expm1(y)) - a
        slope = y * e
        newton = f / jnp.where(slope > 0.0, slope, 1.0)
        # Halley: f'' / f' = 1 + 1/y
        y_next = y - newton / (1.0 - 0.5 * newton * (1.0 + 1.0 / jnp.where(y > 0.0, y, 1.0)))
        return jnp.where(a > 0.0, jnp.maximum(y_next, 0.0), 0.0)

    return jax.lax.fori_loop(0, 6, halley, y)


def efficiency_for_energy_ratio(log_ratio):
    """u > 0 with log(expm1(u)/u) = L for L > 0: the nats/s/Hz at which one needs e^L times the power of the wideband
    limit.

    With c = N0 R ln2 / (P g) < 1 (energy per bit at infinite bandwidth over the energy at hand) and L = -log c, the
    smallest bandwidth that carries rate R is R ln2 / u. It equals -R ln2 / (W_-1(-c e^-c) + c), without the
    cancellation. Elementwise; L <= 0 (infeasible) gives 0, that is infinite bandwidth.

    Args:
      log_ratio: any shape, L.

    Returns:
      (u, du_dl), same shape.
    """
    ok = log_ratio > 0.0
    level = jnp.where(ok, log_ratio, 1.0)
    u = level + jnp.log1p(level)

    def value_and_slope(u):
        grown = jnp.expm1(u)
        # log(expm1(u)/u), overflow-free: u + log(-expm1(-u)) - log u
        value = u + jnp.log(-jnp.expm1(-u)) - jnp.log(u)
        # log(sinh(u/2)/(u/2)) + u/2 as a series: float32 would lose 5 digits in the closed form
        v = u * u
        small = u * (0.5 + u * (1 / 24 - v * (1 / 2880 - v * (1 / 181440 - v / 9676800))))
        slope_small = 0.5 + u * (1 / 12 - v * (1 / 720 - v * (1 / 30240 - v / 1209600)))
        slope = 1.0 + 1.0 / grown - 1.0 / u
        return jnp.where(u < 0.7, small, value), jnp.where(u < 0.7, slope_small, slope)

    def newton(_, carry):
        u, _ = carry
        value, slope = value_and_slope(u)
        return u - (value - level) / slope, slope

    # A loop, not four copies: the callers put this into loops of their own, and XLA's compile time counts.
    # The slope is that of the last but one iterate: a Newton step from the end, it differs by rounding.
    u, slope = jax.lax.fori_loop(0, 4, newton, (u, jnp.ones_like(u)))
    return jnp.where(ok, u, 0.0), jnp.where(ok, 1.0 / slope, 2.0)


def bessel_j0(x):
    """Bessel function J0(x), any real x, elementwise; absolute error below 1e-9 in float64.

    |x| < 25: the integral (1/2pi) int cos(x sin t) dt by the midpoint rule with 64 points, whose error is 2 J_64(x)
    (16 points by symmetry). Beyond: Hankel's asymptotic series. jax.scipy.special.bessel_jn is NaN at 0.
    """
    x = jnp.abs(jnp.asarray(x))
    nodes = np.sin((np.arange(16) + 0.5) * np.pi / 32.0)
    small = sum(jnp.cos(jnp.minimum(x, 25.0) * float(s)) for s in nodes) / 16.0
    z = 1.0 / (8.0 * jnp.maximum(x, 25.0))
    z2 = z * z
    p = 1.0 - z2 * (9.0 / 2.0 - z2 * (11025.0 / 24.0 - z2 * (108056025.0 / 720.0)))
    q = -z * (1.0 - z2 * (225.0 / 6.0 - z2 * (893025.0 / 120.0)))
    phase = x - np.pi / 4.0
    large = jnp.sqrt(2.0 / (np.pi * jnp.maximum(x, 25.0))) * (p * jnp.cos(phase) - q * jnp.sin(phase))
    return jnp.where(x < 25.0, small, large)


def scaled_exp1(x):
    """e^x E1(x) for x > 0, elementwise, relative error 1e-9 in float64: no overflow at large x.

    x < 1: the power series; beyond: 40 terms of the continued fraction 1/(x+1 - 1/(x+3 - 4/(x+5 - ...))). A fixed
    number of operations: jax.scipy.special.exp1 iterates until it converges, which under vmap may be never (x near 0).
    """
    x = jnp.asarray(x)
    low = jnp.clip(x, jnp.finfo(x.dtype).tiny, 1.0)
    series, term = jnp.zeros_like(low), -jnp.ones_like(low)
    for k in range(1, 18):
        term = -term * low / k
        series = series + term / k
    near = jnp.exp(low) * (series - np.euler_gamma - jnp.log(low))
    high = jnp.maximum(x, 1.0)
    tail = high + 81.0
    for k in range(40, 0, -1):
        tail = high + (2 * k - 1) - k * k / tail
    return jnp.where(x < 1.0, near, 1.0 / tail)


def q_function(x):
    """Gaussian tail probability Q(x), elementwise."""
    return 0.5 * jax.scipy.special.erfc(x * np.sqrt(0.5))
