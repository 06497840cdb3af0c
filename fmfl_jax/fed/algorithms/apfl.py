"""APFL (Deng, Kamani, Mahdavi, 2020, arXiv:2003.13461): a client's model is a mixture of its own and the shared one.

    m = alpha v + (1 - alpha) w;   w <- w - eta grad F(w);   v <- v - eta alpha grad F(m)
    alpha <- clip(alpha - eta_alpha <v - w, grad F(m)>, 0, 1)           where it is learned

alpha grad F(m) is the gradient of F(m) by v. w is the client's copy, trained beside v on the same batches, then
averaged; the client's model for evaluation mixes v with the server's w. The degree of personalization is alpha: 0 is
the shared model, 1 training alone.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fmfl_jax.fed.algorithms.fed_opt import with_server
from fmfl_jax.fed.core.client import local_update, toward
from fmfl_jax.fed.core.types import ClientResult, Delivery, FederatedAlgorithm

_MIXED = 2**30  # folded into keys; local steps stay below


def apfl(
    grad_fn: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    alpha: float,
    alpha_learning_rate: float | None = None,
    proximal: float = 0.0,
    delivery: Delivery = Delivery(),
) -> FederatedAlgorithm:
    """The algorithm. A client keeps {"v": parameters, "alpha": float32 scalar}; v starts as the shared ones do.

    client_optimizer: of w and of v alike; it should treat every value by itself (no clipping of a global norm), since
    it sees both as one tree. alpha: everybody's at the start. alpha_learning_rate: eta_alpha; a client's alpha takes
    one step in each round, on the first batch, before v and w do; None keeps it. While v = w, before a client's first
    round, alpha has no gradient. The metric "alpha" is the mean over the round's clients. proximal: FedProx's mu on w.

    Raises ValueError for an alpha outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"APFL's alpha must be in [0, 1], got {alpha}")

    def client(state, frozen, own, key) -> ClientResult:
        v, mix, num_steps = own.client_states["v"], own.client_states["alpha"], own.extras.get("num_steps")
        if alpha_learning_rate is not None:
            first = jax.tree.map(lambda x: x[0], own.batches)
            _, grad = grad_fn(_mixed(v, state.params, mix), frozen, first, jax.random.fold_in(key, _MIXED))
            slope = optax.tree.vdot(jax.tree.map(jnp.subtract, v, state.params), grad)
            mix = jnp.clip(mix - alpha_learning_rate * slope, 0.0, 1.0)

        def both(params, frozen, batch, key):
            loss, shared = grad_fn(params["w"], frozen, batch, key)
            _, mixed = grad_fn(_mixed(params["v"], params["w"], mix), frozen, batch, key)
            return loss, {"w": shared, "v": jax.tree.map(lambda g: mix * g, mixed)}

        def pulled(grad, params):
            return grad | {"w": toward(state.params, proximal)(grad["w"], params["w"])}

        start = {"w": state.params, "v": v}
        update = local_update(
            both,
            client_optimizer,
            start,
            frozen,
            own.batches,
            key,
            adjust=pulled if proximal else None,
            num_steps=num_steps,
        )
        kept = {"v": jax.tree.map(jnp.subtract, v, update.delta["v"]), "alpha": mix}
        return ClientResult(update.delta["w"], {"loss": update.loss, "alpha": mix}, kept)

    return with_server(
        client,
        server_optimizer,
        init_own=lambda params, client_id: {"v": params, "alpha": jnp.float32(alpha)},
        personal=lambda params, own: _mixed(own["v"], params, own["alpha"]),
        delivery=delivery,
    )


def _mixed(v, w, alpha):
    return jax.tree.map(lambda a, b: alpha * a + (1 - alpha) * b, v, w)
