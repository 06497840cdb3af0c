"""FedAvg (McMahan et al., AISTATS 2017), FedOpt (Reddi et al., ICLR 2021) and FedProx (Li et al., MLSys 2020).

    delta = sum_c n_c (w - w_c) / sum_c n_c;   w <- server_optimizer(w, delta)

The weighted mean of the clients' deltas is the server optimizer's gradient. SGD with learning rate 1 is FedAvg; SGD
with momentum is FedAvgM; fed/server_optimizers.py has Reddi's Adam, Yogi and Adagrad, and optax.adam, yogi and adagrad
are FedOpt with optax's bias correction and starting values. FedProx adds mu / 2 ||w_c - w||^2 to the clients' objective
(eq. 2). With the factors of LoRA as parameters FedAvg is FedIT (Zhang et al., ICASSP 2024).
"""

from collections.abc import Callable

import optax

from fmfl_jax.fed.core.client import local_update, toward
from fmfl_jax.fed.core.round import make_algorithm
from fmfl_jax.fed.core.types import ClientResult, Delivery, FederatedAlgorithm
from fmfl_jax.optimize import optimizer_step


def fed_opt(
    grad_fn: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    proximal: float = 0.0,
    delivery: Delivery = Delivery(),
) -> FederatedAlgorithm:
    """The algorithm.

    grad_fn(params, frozen, batch, key) -> (loss, grad) of one local step's batch: jax.value_and_grad of a mean loss, or
    a private one. server_optimizer: default optax.sgd(1.0), which is FedAvg. proximal: FedProx's mu, 0 for none.
    """

    def client(state, frozen, own, key) -> ClientResult:
        update = local_update(
            grad_fn,
            client_optimizer,
            state.params,
            frozen,
            own.batches,
            key,
            adjust=toward(state.params, proximal) if proximal else None,
            num_steps=own.extras.get("num_steps"),
        )
        return ClientResult(update.delta, {"loss": update.loss})

    return with_server(client, server_optimizer, delivery=delivery)


def with_server(
    client: Callable,
    server_optimizer: optax.GradientTransformation | None,
    *,
    delivery: Delivery,
    init_own: Callable | None = None,
    personal: Callable | None = None,
) -> FederatedAlgorithm:
    """The algorithm of clients that send their deltas. init_own, personal: see make_algorithm."""
    server_optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer

    def server(state, update):
        return *optimizer_step(server_optimizer, update, state.opt_state, state.params), ()

    return make_algorithm(
        client,
        server,
        init_server=lambda params: (params, server_optimizer.init(params), ()),
        init_own=init_own,
        delivery=delivery,
        personal=personal,
    )
