"""Chooses among candidates by their mean loss on many tokens, at the price of a few tokens for most of them.

A Hoeffding race (Maron & Moore, "Hoeffding races", NIPS 1994) with a normal bound on paired differences in place of
Hoeffding's: all candidates are given one part of the tokens after the other, and one that has fallen behind the leader
by more than chance explains is left out of the rest.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

STANDARD_ERRORS = 3.0  # how certain it must be that a candidate is behind
TOLERANCE = 0.005  # of the leader's mean loss: what a candidate may be better by and yet be dropped


def race(loss: Callable, num_candidates: int, num_passes: int) -> jax.Array:
    """The candidate, int32 scalar, with the smallest mean loss over all passes, to within TOLERANCE.

    After each pass a candidate is dropped if its mean difference from the leader, token by token, is more than
    STANDARD_ERRORS of its standard errors above -TOLERANCE times the leader's mean. The race ends with one left, or
    with the last pass; with one pass alone it is the plain comparison.

    Args:
      loss: (candidate int32 scalar, number of the pass int32 scalar) -> float32 [n], one loss per token; n is the same
        for all passes. A part of the tokens may as well be a part of a product's columns.
    """
    tokens = jax.eval_shape(loss, jnp.int32(0), jnp.int32(0)).shape[0]
    candidates = jnp.arange(num_candidates, dtype=jnp.int32)

    def running(state):
        _, alive, i = state
        return (i < num_passes) & (jnp.sum(alive) > 1)

    def one_pass(state):
        losses, alive, i = state
        new = jax.lax.map(
            lambda c: jax.lax.cond(alive[c], lambda: loss(c, i), lambda: jnp.full(tokens, jnp.inf)), candidates
        )
        losses = losses.at[:, i].set(new)
        done = ((i + 1) * tokens).astype(jnp.float32)
        leader = jnp.argmin(_totals(losses, alive))
        difference = losses - losses[leader][None]  # zeros in the passes to come
        mean = jnp.sum(difference, axis=(1, 2)) / done
        variance = jnp.sum(difference**2, axis=(1, 2)) / done - mean**2
        error = jnp.sqrt(jnp.maximum(variance, 0.0) / done)
        behind = mean - STANDARD_ERRORS * error > -TOLERANCE * jnp.sum(losses[leader]) / done
        return losses, alive & (~behind | (candidates == leader)), i + 1

    start = (jnp.zeros((num_candidates, num_passes, tokens)), jnp.full(num_candidates, True), jnp.int32(0))
    losses, alive, _ = jax.lax.while_loop(running, one_pass, start)
    return jnp.argmin(_totals(losses, alive)).astype(jnp.int32)


def _totals(losses, alive):
    return jnp.where(alive, jnp.sum(losses, axis=(1, 2)), jnp.inf)
