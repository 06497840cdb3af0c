"""SCAFFOLD (Karimireddy et al., ICML 2020): control variates that take the drift out of local steps.

    y <- y - eta (g_i(y) - c_i + c), K times from y = x;   c_i' = c_i - c + (x - y) / (K eta)          (option II)
    x <- server_optimizer(x, mean of x - y);   c <- c + |S| / N  mean of (c_i' - c_i)

so that c stays the mean of all N clients' c_i. (x - y) / (K eta) is the mean corrected gradient of plain SGD steps of
size eta, and of no other optimizer: the clients take a learning rate. The objective is the plain mean of the clients'
whatever the weights of the mean of x - y, which only change the way there.

    >>> algorithm = scaffold(grad_fn, 0.1, num_clients=10)
    >>> state = algorithm.init(params, seed=0)
    >>> c_i = algorithm.init_client(params, client_id)
    >>> context = ClientContext(algorithm.broadcast(state), frozen, c_i, client_id, weight, None, key)
    >>> update, weight, c_i, metrics = run_client(algorithm.client, context, batches)
"""

import jax
import jax.numpy as jnp
import optax

from fmfl_jax.fed.algorithms.fed_opt import FED_AVG, start_server
from fmfl_jax.fed.core.client import start_training, train_step
from fmfl_jax.fed.core.types import (
    Aggregate,
    ClientResult,
    ClientUpdate,
    FederatedAlgorithm,
    GradFn,
    Optimizer,
    Phase,
    ServerState,
)
from fmfl_jax.optimize import optimizer_step


def scaffold(
    grad_fn: GradFn, learning_rate: float, server_optimizer: Optimizer = FED_AVG, *, num_clients: int
) -> FederatedAlgorithm:
    """The algorithm. Updates are {"delta", "control"}, messages {"params", "control"}; a client keeps its c_i,
    ServerState.extra is c.

    learning_rate: eta of the clients' SGD. server_optimizer: of the mean delta. num_clients: N. A client that is lost
    keeps its c_i, and c does not learn of it. What a lossy codec loses, c misses.

    Raises ValueError for something else than a learning rate.
    """
    if not isinstance(learning_rate, int | float) or not learning_rate > 0:
        raise ValueError(f"SCAFFOLD's clients take SGD steps of a fixed learning rate above 0, got {learning_rate!r}")
    optimizer = optax.sgd(learning_rate)

    def begin(context):
        num_steps = jnp.int32(0)  # counted, since a client may have fewer than the cohort's largest
        return start_training(optimizer, context.message["params"]), num_steps

    def step(context, work, batch, key):
        training, num_steps = work
        c, c_i = context.message["control"], context.state
        corrected = lambda grad, params: jax.tree.map(lambda g, a, b: g - a + b, grad, c_i, c)
        training, loss = train_step(grad_fn, optimizer, training, context.frozen, batch, key, corrected)
        return (training, num_steps + 1), {"loss": loss}

    def finish(context, work, metrics):
        training, num_steps = work
        c, c_i = context.message["control"], context.state
        delta = optax.tree.sub(context.message["params"], training.params)
        rate = 1 / (learning_rate * jnp.maximum(num_steps, 1).astype(jnp.float32))
        change = jax.tree.map(lambda a, d: jnp.where(num_steps > 0, rate * d - a, jnp.zeros_like(a)), c, delta)
        # c is a plain mean: the weight that the update will get is taken out.
        unweighted = jax.tree.map(lambda x: x / jnp.where(context.weight > 0, context.weight, 1.0), change)
        update = {"delta": delta, "control": unweighted}
        return ClientResult(update, context.weight, jax.tree.map(jnp.add, c_i, change), metrics)

    def server(state: ServerState, aggregate: Aggregate) -> ServerState:
        delta, control = aggregate.update["delta"], aggregate.update["control"]
        params, opt_state = optimizer_step(server_optimizer, delta, state.opt_state, state.params)
        share = aggregate.denominator / num_clients  # the mean of the controls made their sum / N
        c = jax.tree.map(lambda c, x: c + share * x, state.extra, control)
        return state._replace(params=params, opt_state=opt_state, extra=c)

    return FederatedAlgorithm(
        init=lambda params, seed: start_server(server_optimizer, params, seed, optax.tree.zeros_like(params)),
        client=ClientUpdate(begin=begin, phases=(Phase(step=step),), finish=finish),
        server=server,
        broadcast=lambda state: {"params": state.params, "control": state.extra},
        init_client=lambda params, client_id: optax.tree.zeros_like(params),
        substitutable=False,
        update_like=lambda params: {"delta": params, "control": params},
    )
