"""What clients do: the local steps that algorithms are made of, and the loops that run a `ClientUpdate`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fmfl_jax.fed.core.types import (
    Array,
    ClientContext,
    ClientResult,
    ClientUpdate,
    GradFn,
    Metrics,
    Optimizer,
    Phase,
    Tree,
)
from fmfl_jax.optimize import optimizer_step

Adjust = Callable[[Tree, Tree], Tree]
"""(grad, params) -> grad: what an algorithm adds to the gradient, such as `toward`."""


class Training(NamedTuple):
    """Parameters in training, and their optimizer's state."""

    params: Tree
    opt_state: Tree


def start_training(optimizer: Optimizer, params: Tree) -> Training:
    """Client optimizers are fresh in every round."""
    return Training(params, optimizer.init(params))


def train_step(
    grad_fn: GradFn,
    optimizer: Optimizer,
    training: Training,
    frozen: Tree,
    batch: Tree,
    key: jax.Array,
    adjust: Adjust | None = None,
) -> tuple[Training, jax.Array]:
    """(training, loss) after one step on one batch."""
    loss, grad = grad_fn(training.params, frozen, batch, key)
    if adjust is not None:
        grad = adjust(grad, training.params)
    return Training(*optimizer_step(optimizer, grad, training.opt_state, training.params)), loss.astype(jnp.float32)


def toward(anchor: Tree, strength: float) -> Adjust:
    """The gradient of strength / 2 ||params - anchor||^2 in the objective."""

    def adjust(grad, params):
        return jax.tree.map(lambda g, w, w0: g + strength * (w - w0), grad, params, anchor)

    return adjust


def run_client(update: ClientUpdate, context: ClientContext, batches: Tree) -> ClientResult:
    """One client's round inside a compiled program. batches: pytree [S, ...]."""
    work, metrics = update.begin(context), {}
    for phase in update.phases:
        work, means = _run_phase(phase, context, work, batches)
        metrics |= means
    return update.finish(context, work, metrics)


def phase_key(phase: Phase, key: jax.Array) -> jax.Array:
    """The key that a phase folds its steps' numbers into."""
    return key if phase.stream is None else jax.random.fold_in(key, phase.stream)


def _run_phase(phase: Phase, context: ClientContext, work: Tree, batches: Tree) -> tuple[Tree, Metrics]:
    key = phase_key(phase, context.key)

    def step(i, batch, work):
        return phase.step(context, work, batch, jax.random.fold_in(key, i))

    if phase.num_steps is None and context.num_steps is not None:
        return _loop(step, context.num_steps, work, batches)
    num_batches = jax.tree.leaves(batches)[0].shape[0]
    steps = jnp.arange(num_batches if phase.num_steps is None else phase.num_steps, dtype=jnp.int32)
    if phase.num_steps is not None:
        held = num_batches if context.num_steps is None else jnp.maximum(context.num_steps, 1)
        batches = jax.tree.map(lambda x: jnp.take(x, steps % held, axis=0), batches)
    work, metrics = jax.lax.scan(lambda work, indexed: step(*indexed, work), work, (steps, batches))
    return work, jax.tree.map(jnp.mean, metrics)


def _loop(
    step: Callable[[jax.Array, Tree, Tree], tuple[Tree, Metrics]], num_steps: Array, work: Tree, batches: Tree
) -> tuple[Tree, Metrics]:
    """As many steps as this client has: under vmap as many as the client with most, without it no step in vain."""
    first = jax.tree.map(lambda x: x[0], batches)
    _, metrics = jax.eval_shape(step, jnp.int32(0), first, work)

    def body(carry):
        i, work, totals = carry
        batch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batches)
        work, metrics = step(i, batch, work)
        return i + 1, work, jax.tree.map(jnp.add, totals, metrics)

    start = (jnp.int32(0), work, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics))
    _, work, totals = jax.lax.while_loop(lambda carry: carry[0] < num_steps, body, start)
    steps = jnp.maximum(num_steps, 1).astype(jnp.float32)
    return work, jax.tree.map(lambda total: total / steps, totals)
