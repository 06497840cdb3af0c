"""SCAFFOLD (Karimireddy et al., ICML 2020): control variates that take the drift out of local steps.

    y <- y - eta (g_i(y) - c_i + c), K times from y = x;   c_i' = c_i - c + (x - y) / (K eta)          (option II)
    x <- server_optimizer(x, mean of x - y);   c <- c + |S| / N  mean of (c_i' - c_i)

so that c stays the mean of all N clients' c_i. (x - y) / (K eta) is the mean corrected gradient of plain SGD steps of
size eta, and of no other optimizer: the clients take a learning rate. The objective is the plain mean of the clients'
whatever the weights of the mean of x - y, which only change the way there.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fmfl_jax.fed.core.client import local_update
from fmfl_jax.fed.core.round import make_algorithm
from fmfl_jax.fed.core.types import Aggregator, ClientResult, Delivery, FederatedAlgorithm
from fmfl_jax.optimize import optimizer_step


def scaffold(
    grad_fn: Callable,
    learning_rate: float,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    num_clients: int,
    delivery: Delivery = Delivery(),
) -> FederatedAlgorithm:
    """The algorithm. A message is {"delta", "control"}, a client keeps its c_i, ServerState.extra is c.

    learning_rate: eta of the clients' SGD. server_optimizer: of the mean delta; default optax.sgd(1.0). num_clients: N.
    A client that is lost keeps its c_i, and c does not learn of it. What a lossy uplink loses, c misses.

    Raises ValueError for something else than a learning rate, and for substitute_lost: a message counted twice would
    part c from the mean of the c_i.
    """
    if not isinstance(learning_rate, (int, float)) or not learning_rate > 0:
        raise ValueError(f"SCAFFOLD's clients take SGD steps of a fixed learning rate above 0, got {learning_rate!r}")
    if delivery.substitute_lost:
        raise ValueError("SCAFFOLD's control variates count every message once: substitute_lost would repeat one")
    server_optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer

    def client(state, frozen, own, key) -> ClientResult:
        c, c_i, num_steps = state.extra, own.client_states, own.extras.get("num_steps")
        update = local_update(
            grad_fn,
            optax.sgd(learning_rate),
            state.params,
            frozen,
            own.batches,
            key,
            adjust=lambda grad, params: jax.tree.map(lambda g, a, b: g - a + b, grad, c_i, c),
            num_steps=num_steps,
        )
        steps = jnp.int32(jax.tree.leaves(own.batches)[0].shape[0]) if num_steps is None else num_steps
        rate = 1 / (learning_rate * jnp.maximum(steps, 1).astype(jnp.float32))
        change = jax.tree.map(lambda a, d: jnp.where(steps > 0, rate * d - a, jnp.zeros_like(a)), c, update.delta)
        # c is a plain mean: the weight that the message will get is taken out.
        unweighted = jax.tree.map(lambda x: x / jnp.where(own.weights > 0, own.weights, 1.0), change)
        return ClientResult(
            {"delta": update.delta, "control": unweighted}, {"loss": update.loss}, jax.tree.map(jnp.add, c_i, change)
        )

    def server(state, update):
        params, opt_state = optimizer_step(server_optimizer, update["delta"], state.opt_state, state.params)
        return params, opt_state, jax.tree.map(jnp.add, state.extra, update["control"])

    def zeros(params):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)

    return make_algorithm(
        client,
        server,
        init_server=lambda params: (params, server_optimizer.init(params), zeros(params)),
        init_own=lambda params, client_id: zeros(params),
        message_like=lambda params: {"delta": params, "control": params},
        download=lambda params, extra: {"params": params, "control": extra},
        delivery=dataclasses.replace(delivery, aggregator=_with_sum_of_controls(delivery.aggregator, num_clients)),
    )


def _with_sum_of_controls(aggregator: Aggregator, num_clients: int) -> Aggregator:
    """The aggregator with its mean of the controls made their sum / N."""

    def finish(mean, state, key):
        update, metrics = mean.update, {}
        if aggregator.finish is not None:
            update, state, metrics = aggregator.finish(mean, state, key)
        share = mean.normalizer / num_clients
        return update | {"control": jax.tree.map(lambda x: share * x, update["control"])}, state, metrics

    return dataclasses.replace(aggregator, finish=finish)
