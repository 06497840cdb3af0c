"""FedBuff (Nguyen et al., AISTATS 2022): asynchronous rounds with a buffer.

    w <- server_optimizer(w, 1/K sum_k (1 + tau_k)^(-1/2) (w_k^start - w_k^end))

A client starts from the parameters that the server had when it began, and its update counts when it is done: tau_k
server steps later. A round here is one server step on the K updates that filled the buffer. Who they are, and how
stale, is the caller's: the cohort's weights are `staleness_weight(tau)` with denominators 1, and what a client keeps
are the parameters that it started from (`dispatch`).

    >>> algorithm = fed_buff(grad_fn, optax.sgd(0.1))
    >>> started = algorithm.dispatch(algorithm.broadcast(state))                # when a client begins
    >>> context = ClientContext(algorithm.broadcast(later), frozen, started, client_id, weight, None, key)
    >>> update = run_client(algorithm.client, context, batches).update          # started - what came of it
"""

import numpy as np
import optax

from fmfl_jax.fed.algorithms.fed_opt import FED_AVG, server_step, start_server
from fmfl_jax.fed.core.client import start_training, train_step
from fmfl_jax.fed.core.types import ClientResult, ClientUpdate, FederatedAlgorithm, GradFn, Optimizer, Phase


def fed_buff(grad_fn: GradFn, client_optimizer: Optimizer, server_optimizer: Optimizer = FED_AVG) -> FederatedAlgorithm:
    """The algorithm."""

    def begin(context):
        return start_training(client_optimizer, context.state)

    def step(context, training, batch, key):
        training, loss = train_step(grad_fn, client_optimizer, training, context.frozen, batch, key)
        return training, {"loss": loss}

    def finish(context, training, metrics):
        delta = optax.tree.sub(context.state, training.params)
        return ClientResult(delta, context.weight, context.state, metrics)

    return FederatedAlgorithm(
        init=lambda params, seed: start_server(server_optimizer, params, seed),
        client=ClientUpdate(begin=begin, phases=(Phase(step=step),), finish=finish),
        server=lambda state, aggregate: server_step(server_optimizer, state, aggregate),
        init_client=lambda params, client_id: params,
        dispatch=lambda message: message,
        substitutable=False,
    )


def staleness_weight(staleness) -> np.ndarray:
    """1 / sqrt(1 + tau), float32."""
    return (1 / np.sqrt(1 + np.asarray(staleness))).astype(np.float32)
