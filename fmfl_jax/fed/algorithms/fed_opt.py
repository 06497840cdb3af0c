"""FedAvg (McMahan et al., AISTATS 2017), FedOpt (Reddi et al., ICLR 2021) and FedProx (Li et al., MLSys 2020).

    delta = sum_c n_c (w - w_c) / sum_c n_c;   w <- server_optimizer(w, delta)

The weighted mean of the clients' deltas is the server optimizer's gradient. SGD with learning rate 1 is FedAvg; SGD
with momentum is FedAvgM; server_optimizers.py has Reddi's Adam, Yogi and Adagrad, and optax.adam, yogi and adagrad are
FedOpt with optax's bias correction and starting values. FedProx adds mu / 2 ||w_c - w||^2 to the clients' objective
(eq. 2). With the factors of LoRA as parameters FedAvg is FedIT (Zhang et al., ICASSP 2024).

    >>> algorithm = fed_opt(jax.value_and_grad(loss_fn), optax.sgd(0.1))
    >>> state = algorithm.init(params, seed=0)
    >>> context = ClientContext(algorithm.broadcast(state), frozen, (), client_id, weight, None, key)
    >>> result = run_client(algorithm.client, context, batches)                        # at a client
    >>> state = algorithm.server(state, Aggregate(result.update, result.metrics, weight, weight))
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fmfl_jax.fed.core.client import start_training, toward, train_step
from fmfl_jax.fed.core.types import (
    Aggregate,
    Array,
    ClientResult,
    ClientUpdate,
    FederatedAlgorithm,
    GradFn,
    Optimizer,
    Phase,
    ServerState,
    Tree,
)
from fmfl_jax.optimize import optimizer_step

Penalty = Callable[[Tree, Tree, Tree], Array]
"""(params, the server's params, frozen) -> what is added to the loss of every local step, float32 scalar."""

FED_AVG = optax.sgd(1.0)  # the server optimizer that takes the mean as it is


def fed_opt(
    grad_fn: GradFn,
    client_optimizer: Optimizer,
    server_optimizer: Optimizer = FED_AVG,
    *,
    proximal: float = 0.0,
    penalty: Penalty | None = None,
) -> FederatedAlgorithm:
    """The algorithm. proximal: FedProx's mu, 0 for none. penalty: another part of the clients' objective, such as the
    distance of features; the loss that is reported is without it."""

    def begin(context):
        return start_training(client_optimizer, context.message)

    def step(context, training, batch, key):
        pull = toward(context.message, proximal) if proximal else None

        def adjust(grad, params):
            grad = grad if pull is None else pull(grad, params)
            if penalty is None:
                return grad
            return jax.tree.map(jnp.add, grad, jax.grad(penalty)(params, context.message, context.frozen))

        training, loss = train_step(grad_fn, client_optimizer, training, context.frozen, batch, key, adjust)
        return training, {"loss": loss}

    def finish(context, training, metrics):
        delta = optax.tree.sub(context.message, training.params)
        return ClientResult(delta, context.weight, (), metrics)

    return FederatedAlgorithm(
        init=lambda params, seed: start_server(server_optimizer, params, seed),
        client=ClientUpdate(begin=begin, phases=(Phase(step=step),), finish=finish),
        server=lambda state, aggregate: server_step(server_optimizer, state, aggregate),
    )


def start_server(server_optimizer: Optimizer, params, seed: int, extra=()) -> ServerState:
    """A server before its first round."""
    return ServerState(params, server_optimizer.init(params), jnp.zeros((), jnp.int32), jnp.uint32(seed), extra)


def server_step(server_optimizer: Optimizer, state: ServerState, aggregate: Aggregate) -> ServerState:
    """One step of the server optimizer on the aggregated delta."""
    params, opt_state = optimizer_step(server_optimizer, aggregate.update, state.opt_state, state.params)
    return state._replace(params=params, opt_state=opt_state)
