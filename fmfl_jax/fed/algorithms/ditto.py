"""Ditto (Li, Hu, Beirami, Smith, ICML 2021): every client keeps a personal model, held near the shared one.

    v_k <- v_k - eta (grad F_k(v_k) + lambda (v_k - w)),   while w is trained and averaged as without it

w is the shared model as it was sent; min F_k(v) + lambda / 2 ||v - w||^2 is the personal model. The degree of
personalization is lambda: 0 trains v_k on the client's data alone, a large one leaves it at w.

    >>> algorithm = ditto(grad_fn, optax.sgd(0.1), strength=0.1)
    >>> v = algorithm.init_client(params, client_id)
    >>> context = ClientContext(algorithm.broadcast(state), frozen, v, client_id, weight, None, key)
    >>> update, weight, v, metrics = run_client(algorithm.client, context, batches)
    >>> model = algorithm.personal(params, v)
"""

import optax

from fmfl_jax import streams
from fmfl_jax.fed.algorithms.fed_opt import FED_AVG, server_step, start_server
from fmfl_jax.fed.core.client import start_training, toward, train_step
from fmfl_jax.fed.core.types import ClientResult, ClientUpdate, FederatedAlgorithm, GradFn, Optimizer, Phase


def ditto(
    grad_fn: GradFn,
    client_optimizer: Optimizer,
    server_optimizer: Optimizer = FED_AVG,
    *,
    strength: float,
    proximal: float = 0.0,
) -> FederatedAlgorithm:
    """The algorithm. A client keeps v_k, which starts as the shared parameters do.

    strength: lambda. Plain SGD of learning rate eta needs eta lambda < 2. The personal steps take the same optimizer,
    fresh in every round, over the same batches. The metric "personal_loss" is their mean. proximal: FedProx's mu on the
    shared model.

    Raises ValueError for a negative strength.
    """
    if not strength >= 0:
        raise ValueError(f"Ditto's strength lambda must be 0 or more, got {strength}")

    def begin(context):
        return start_training(client_optimizer, context.message), start_training(client_optimizer, context.state)

    def shared_step(context, work, batch, key):
        shared, personal = work
        pull = toward(context.message, proximal) if proximal else None
        shared, loss = train_step(grad_fn, client_optimizer, shared, context.frozen, batch, key, pull)
        return (shared, personal), {"loss": loss}

    def personal_step(context, work, batch, key):
        shared, personal = work
        pull = toward(context.message, strength)
        personal, loss = train_step(grad_fn, client_optimizer, personal, context.frozen, batch, key, pull)
        return (shared, personal), {"personal_loss": loss}

    def finish(context, work, metrics):
        shared, personal = work
        delta = optax.tree.sub(context.message, shared.params)
        return ClientResult(delta, context.weight, personal.params, metrics)

    return FederatedAlgorithm(
        init=lambda params, seed: start_server(server_optimizer, params, seed),
        client=ClientUpdate(
            begin=begin,
            phases=(Phase(step=shared_step), Phase(step=personal_step, stream=streams.PERSONAL)),
            finish=finish,
        ),
        server=lambda state, aggregate: server_step(server_optimizer, state, aggregate),
        init_client=lambda params, client_id: params,
        personal=lambda params, state: state,
    )
