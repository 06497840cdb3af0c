"""What a client does in a round: some steps of its own optimizer from the server's parameters."""

from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fmfl_jax.fed.optimize import optimizer_step


class ClientUpdate(NamedTuple):
    """delta: server parameters - client parameters (the pseudo-gradient). loss: float32, mean over the local steps."""

    delta: Any
    loss: jax.Array


def local_update(loss_fn: Callable, optimizer: optax.GradientTransformation, server_params, frozen, batches, key, *,
                 proximal: float = 0.0) -> ClientUpdate:
    """Takes one step of `optimizer`, fresh in every round, for each slice of batches [S, ...].

    loss_fn(params, frozen, batch, key) -> scalar. `proximal` is FedProx's mu: the gradient of
    mu / 2 ||params - server_params||^2 is added to that of the loss (Li et al., MLSys 2020, eq. 2).
    """

    def step(carry, batch_and_index):
        params, opt_state = carry
        batch, index = batch_and_index
        loss, grad = jax.value_and_grad(loss_fn)(params, frozen, batch, jax.random.fold_in(key, index))
        if proximal:
            grad = jax.tree.map(lambda g, w, w0: g + proximal * (w - w0), grad, params, server_params)
        return optimizer_step(optimizer, grad, opt_state, params), loss

    num_steps = jax.tree.leaves(batches)[0].shape[0]
    steps = jnp.arange(num_steps, dtype=jnp.int32)
    (params, _), losses = jax.lax.scan(step, (server_params, optimizer.init(server_params)), (batches, steps))
    delta = jax.tree.map(jnp.subtract, server_params, params)
    return ClientUpdate(delta, jnp.mean(losses.astype(jnp.float32)))
