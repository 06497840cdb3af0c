"""Special functions against scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from fmfl_jax.wireless import special


@pytest.mark.parametrize("x64, tolerance", [(True, 1e-9), (False, 2e-6)])
def test_special_functions_match_scipy(x64, tolerance):
    with jax.enable_x64(x64):
        x = np.linspace(-200.0, 200.0, 2001)
        e1 = np.logspace(-8, 2, 80)
        np.testing.assert_allclose(
            jax.jit(special.scaled_exp1)(jnp.asarray(e1)), np.exp(e1) * scipy.special.exp1(e1), rtol=tolerance
        )
        np.testing.assert_allclose(
            jax.jit(special.bessel_j0)(jnp.asarray(x)), scipy.special.j0(x), atol=1e-9 if x64 else 1e-6
        )


@pytest.mark.parametrize("x64, tolerance", [(True, 5e-9), (False, 1e-6)])
def test_roots_of_the_allocation_problems_hold_over_all_scales(x64, tolerance):
    """Inverses of functions that are computed exactly: y from (y - 1) e^y + 1 (a series below 2), u from
    log(expm1(u)/u)."""
    y = np.logspace(-5, 1.8, 120)
    n = np.arange(2, 60)[:, None]
    a = np.where(y < 2.0, np.sum(y**n / (n * scipy.special.factorial(n - 2)), axis=0), (y - 1.0) * np.exp(y) + 1.0)
    u = np.logspace(-5, 2, 120)
    level = np.where(u < 1e-3, u * (0.5 + u / 24.0), np.log(np.expm1(u) / u))
    with jax.enable_x64(x64):
        np.testing.assert_allclose(jax.jit(special.one_plus_w0)(jnp.asarray(a)), y, rtol=tolerance)
        root, slope = jax.jit(special.efficiency_for_energy_ratio)(jnp.asarray(level))
        np.testing.assert_allclose(root, u, rtol=tolerance)
    if x64:
        np.testing.assert_allclose(slope, np.gradient(u, level), rtol=0.05)
    assert float(special.one_plus_w0(jnp.float32(0.0))) == 0.0


def test_require_positive_names_the_argument():
    with pytest.raises(ValueError, match="bandwidth_hz must be positive, got -1"):
        special.require_positive(bandwidth_hz=np.asarray([1.0, -1.0]))
    with pytest.raises(ValueError, match="power_w"):
        special.require_positive(power_w=float("nan"))
