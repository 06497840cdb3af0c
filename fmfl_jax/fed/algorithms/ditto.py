"""Ditto (Li et al., ICML 2021): every client keeps a model of its own, held near the shared one.

    v_k <- v_k - eta (grad F_k(v_k) + lambda (v_k - w)),   while w is trained and averaged as without it

w is the shared model as it was sent; min F_k(v) + lambda / 2 ||v - w||^2 is the personal model. The degree of
personalization is lambda: 0 trains v_k on the client's data alone, a large one leaves it at w.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fmfl_jax.fed.algorithms.fed_opt import with_server
from fmfl_jax.fed.core.client import first_batches, local_update, toward
from fmfl_jax.fed.core.types import ClientResult, Delivery, FederatedAlgorithm

_PERSONAL = 2**30  # folded into keys; local steps stay below


def ditto(
    grad_fn: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    strength: float,
    personal_optimizer: optax.GradientTransformation | None = None,
    personal_steps: int | None = None,
    proximal: float = 0.0,
    delivery: Delivery = Delivery(),
) -> FederatedAlgorithm:
    """The algorithm. A client keeps v_k, which starts as the shared parameters do.

    strength: lambda. Plain SGD of learning rate eta needs eta lambda < 2. personal_optimizer: of the personal steps,
    fresh in every round; default client_optimizer. personal_steps: how many, over the round's batches again from the
    first; None: as many as shared ones. The metric "personal_loss" is their mean. proximal: FedProx's mu on the
    shared model.

    Raises ValueError for a negative strength and for no personal steps.
    """
    if not strength >= 0:
        raise ValueError(f"Ditto's strength lambda must be 0 or more, got {strength}")
    if personal_steps is not None and personal_steps < 1:
        raise ValueError(f"Ditto needs at least 1 personal step, got {personal_steps}")
    personal_optimizer = client_optimizer if personal_optimizer is None else personal_optimizer

    def client(state, frozen, own, key) -> ClientResult:
        num_steps = own.extras.get("num_steps")
        update = local_update(
            grad_fn,
            client_optimizer,
            state.params,
            frozen,
            own.batches,
            key,
            adjust=toward(state.params, proximal) if proximal else None,
            num_steps=num_steps,
        )
        v, batches, personal_num_steps = own.client_states, own.batches, num_steps
        if personal_steps is not None:
            batches, personal_num_steps = first_batches(batches, personal_steps, num_steps), None
        personal = local_update(
            grad_fn,
            personal_optimizer,
            v,
            frozen,
            batches,
            jax.random.fold_in(key, _PERSONAL),
            adjust=toward(state.params, strength),
            num_steps=personal_num_steps,
        )
        return ClientResult(
            update.delta,
            {"loss": update.loss, "personal_loss": personal.loss},
            jax.tree.map(jnp.subtract, v, personal.delta),
        )

    return with_server(
        client,
        server_optimizer,
        init_own=lambda params, client_id: params,
        personal=lambda params, own: own,
        delivery=delivery,
    )
