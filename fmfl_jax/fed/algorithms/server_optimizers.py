"""FedAdam, FedYogi and FedAdagrad: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, Algorithm 2.

    m <- b1 m + (1 - b1) d;   v <- second moment;   w <- w + eta m / (sqrt(v) + tau)
    Adagrad: v + d^2    Yogi: v - (1 - b2) d^2 sign(v - d^2)    Adam: b2 v + (1 - b2) d^2

with d = -delta, v starting at tau^2, and no bias correction. optax's adam, yogi and adagrad differ in all three: with
b1 .9, b2 .99, eta .1, tau 1e-3 the first step of .5 from .1 leads to .198020 here and to .199800 with optax.adam.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class ReddiState(NamedTuple):
    """m and v, trees like the parameters."""

    m: optax.Params
    v: optax.Params


def fed_adam(learning_rate: float, *, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3):
    """FedAdam; tau is the degree of adaptivity. An optax transformation of the pseudo-gradient."""
    return _adaptive(learning_rate, b1, tau, lambda v, square: b2 * v + (1 - b2) * square)


def fed_yogi(learning_rate: float, *, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3):
    """FedYogi."""
    return _adaptive(learning_rate, b1, tau, lambda v, square: v - (1 - b2) * square * jnp.sign(v - square))


def fed_adagrad(learning_rate: float, *, b1: float = 0.0, tau: float = 1e-3):
    """FedAdagrad; the paper's experiments use no momentum."""
    return _adaptive(learning_rate, b1, tau, lambda v, square: v + square)


def _adaptive(learning_rate: float, b1: float, tau: float, second_moment: Callable[[jax.Array, jax.Array], jax.Array]):
    def init(params):
        return ReddiState(optax.tree.zeros_like(params), jax.tree.map(lambda x: jnp.full_like(x, tau**2), params))

    def update(updates, state, params=None):
        del params
        m = jax.tree.map(lambda m, d: b1 * m + (1 - b1) * d, state.m, updates)
        v = jax.tree.map(lambda v, d: second_moment(v, jnp.square(d)), state.v, updates)
        return jax.tree.map(lambda m, v: -learning_rate * m / (jnp.sqrt(v) + tau), m, v), ReddiState(m, v)

    return optax.GradientTransformation(init, update)
