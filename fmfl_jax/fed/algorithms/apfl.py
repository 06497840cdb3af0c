"""APFL (Deng, Kamani, Mahdavi, 2020, arXiv:2003.13461): a client's model is a mixture of a personal and the shared one.

    m = alpha v + (1 - alpha) w;   w <- w - eta grad F(w);   v <- v - eta alpha grad F(m)
    alpha <- clip(alpha - eta_alpha <v - w, grad F(m)>, 0, 1)           where it is learned

alpha grad F(m) is the gradient of F(m) by v. w is the client's copy, trained beside v on the same batches, then
averaged; the client's model for evaluation mixes v with the server's w. The degree of personalization is alpha: 0 is
the shared model, 1 training alone.

    >>> algorithm = apfl(grad_fn, optax.sgd(0.1), alpha=0.5)
    >>> kept = algorithm.init_client(params, client_id)                       # {"v", "alpha"}
    >>> context = ClientContext(algorithm.broadcast(state), frozen, kept, client_id, weight, None, key)
    >>> update, weight, kept, metrics = run_client(algorithm.client, context, batches)
    >>> model = algorithm.personal(params, kept)
"""

import jax
import jax.numpy as jnp
import optax

from fmfl_jax import streams
from fmfl_jax.fed.algorithms.fed_opt import FED_AVG, server_step, start_server
from fmfl_jax.fed.core.client import start_training, toward, train_step
from fmfl_jax.fed.core.types import ClientResult, ClientUpdate, FederatedAlgorithm, GradFn, Optimizer, Phase


def apfl(
    grad_fn: GradFn,
    client_optimizer: Optimizer,
    server_optimizer: Optimizer = FED_AVG,
    *,
    alpha: float,
    alpha_learning_rate: float | None = None,
    proximal: float = 0.0,
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

    def begin(context):
        start = {"w": context.message, "v": context.state["v"]}
        return start_training(client_optimizer, start), context.state["alpha"]

    def step(context, work, batch, key):
        training, alpha = work

        def both(params, frozen, batch, key):
            loss, shared = grad_fn(params["w"], frozen, batch, key)
            _, mixed = grad_fn(_mixed(params["v"], params["w"], alpha), frozen, batch, key)
            return loss, {"w": shared, "v": optax.tree.scale(alpha, mixed)}

        def pulled(grad, params):
            return grad | {"w": toward(context.message, proximal)(grad["w"], params["w"])}

        pull = pulled if proximal else None
        training, loss = train_step(both, client_optimizer, training, context.frozen, batch, key, pull)
        return (training, alpha), {"loss": loss}

    def finish(context, work, metrics):
        training, alpha = work
        delta = optax.tree.sub(context.message, training.params["w"])
        kept = {"v": training.params["v"], "alpha": alpha}
        return ClientResult(delta, context.weight, kept, metrics | {"alpha": alpha})

    learning = () if alpha_learning_rate is None else (_learn_alpha(grad_fn, alpha_learning_rate),)
    return FederatedAlgorithm(
        init=lambda params, seed: start_server(server_optimizer, params, seed),
        client=ClientUpdate(begin=begin, phases=(*learning, Phase(step=step)), finish=finish),
        server=lambda state, aggregate: server_step(server_optimizer, state, aggregate),
        init_client=lambda params, client_id: {"v": params, "alpha": jnp.float32(alpha)},
        personal=lambda params, state: _mixed(state["v"], params, state["alpha"]),
    )


def _learn_alpha(grad_fn: GradFn, learning_rate: float) -> Phase:
    """One step on a client's alpha."""

    def step(context, work, batch, key):
        training, alpha = work
        v, w = training.params["v"], training.params["w"]
        _, grad = grad_fn(_mixed(v, w, alpha), context.frozen, batch, key)
        slope = optax.tree.vdot(optax.tree.sub(v, w), grad)
        return (training, jnp.clip(alpha - learning_rate * slope, 0.0, 1.0)), {}

    return Phase(step=step, num_steps=1, stream=streams.PERSONAL)


def _mixed(v, w, alpha):
    return jax.tree.map(lambda a, b: alpha * a + (1 - alpha) * b, v, w)
