"""What a client does in a round: some steps of its own optimizer from given parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fmfl_jax.optimize import optimizer_step


class ClientUpdate(NamedTuple):
    """delta: parameters at the start - at the end (the pseudo-gradient). loss: float32, mean over the local steps."""

    delta: Any
    loss: jax.Array


def local_update(
    grad_fn: Callable,
    optimizer: optax.GradientTransformation,
    start,
    frozen,
    batches,
    key,
    *,
    adjust: Callable | None = None,
    num_steps=None,
) -> ClientUpdate:
    """Takes one step of `optimizer`, fresh in every round, for each slice of batches [S, ...].

    grad_fn(params, frozen, batch, key) -> (loss, grad). adjust(grad, params) -> grad: what an algorithm adds to the
    gradient, such as `toward`. num_steps: int32 scalar, only the first so many slices; None for all.
    """

    def step(i, batch, params, opt_state):
        loss, grad = grad_fn(params, frozen, batch, jax.random.fold_in(key, i))
        if adjust is not None:
            grad = adjust(grad, params)
        return *optimizer_step(optimizer, grad, opt_state, params), loss.astype(jnp.float32)

    opt_state = optimizer.init(start)
    if num_steps is None:

        def scanned(carry, indexed):
            *carry, loss = step(*indexed, *carry)
            return tuple(carry), loss

        steps = jnp.arange(jax.tree.leaves(batches)[0].shape[0], dtype=jnp.int32)
        (params, _), losses = jax.lax.scan(scanned, (start, opt_state), (steps, batches))
        loss = jnp.mean(losses)
    else:

        def looped(carry):
            i, params, opt_state, total = carry
            batch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batches)
            params, opt_state, loss = step(i, batch, params, opt_state)
            return i + 1, params, opt_state, total + loss

        first = (jnp.int32(0), start, opt_state, jnp.float32(0))
        _, params, _, total = jax.lax.while_loop(lambda carry: carry[0] < num_steps, looped, first)
        loss = total / jnp.maximum(num_steps, 1).astype(jnp.float32)
    return ClientUpdate(jax.tree.map(jnp.subtract, start, params), loss)


def toward(anchor, strength: float) -> Callable:
    """The `adjust` of strength / 2 ||params - anchor||^2 in the objective."""

    def adjust(grad, params):
        return jax.tree.map(lambda g, w, w0: g + strength * (w - w0), grad, params, anchor)

    return adjust


def first_batches(batches, count: int, num_steps=None):
    """The first `count` slices of batches [S, ...], from the first again after the last. num_steps: int32 scalar, only
    the first so many are the client's; None for all."""
    held = jax.tree.leaves(batches)[0].shape[0] if num_steps is None else jnp.maximum(num_steps, 1)
    steps = jnp.arange(count, dtype=jnp.int32) % held
    return jax.tree.map(lambda x: jnp.take(x, steps, axis=0), batches)
