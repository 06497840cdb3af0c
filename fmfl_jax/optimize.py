"""One step of an optax optimizer."""

from typing import Any

import jax
import optax


def optimizer_step(optimizer: optax.GradientTransformation, grad, opt_state, params) -> tuple[Any, optax.OptState]:
    """(params, opt_state) after `grad`. optax mixes float32 with int32 counters, so it runs under the usual promotion
    rules even where the rest of a program is strict."""
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(grad, opt_state, params)
        return optax.apply_updates(params, updates), opt_state
