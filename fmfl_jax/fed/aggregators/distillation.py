"""A server with data of its own: it trains on after the mean, and weighs clients by how well they do on its data.

    w <- w - sum_c a_c delta_c;   J times: w <- optimizer(w, grad_w loss(w, teacher))                    (distillation)
    a_c ~ n_c f(score of w_c on the server's data)                                                        (re-weighting)

With the clients' averaged logits as teacher this is FedDF (Lin et al., NeurIPS 2020, Algorithm 1); with a foundation
model's answers it is the survey's section III-B, with both mixed its III-A2. The data stay in the functions that are
passed in.

    >>> aggregator = distillation(loss_fn, optax.sgd(0.5), num_steps=15)   # loss_fn(params, teacher, key)
    >>> parts = make_round(algorithm, aggregator=aggregator)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fmfl_jax.fed.core.reduce import divided, gathered_mean, weighted_sum
from fmfl_jax.fed.core.types import Aggregator, Array, GatheredUpdates, Metrics, Optimizer, Tree
from fmfl_jax.optimize import optimizer_step

Mean = Callable[[GatheredUpdates], tuple[Tree, Metrics]]
"""GatheredUpdates -> (one update, metrics)."""
Teach = Callable[[Tree, Array], Tree]
"""(client models, leaves [C, ...]; their weights float32 [C], 0 for absent ones) -> what loss_fn takes as teacher."""


def weighted_mean(gathered: GatheredUpdates) -> tuple[Tree, Metrics]:
    """By numbers of examples."""
    return gathered_mean(gathered), {}


def reweighted_mean(score: Callable[[Tree], Array], weigh: Callable[[Array, Array], Array]) -> Mean:
    """The mean by scores of the clients' models on the server's data.

    score(params) -> float32 scalar, such as an accuracy. weigh(weights [C], scores [C]) -> weights [C]; a client that
    is absent has weight 0 and keeps it. Metric: malicious_share, the attackers' share of the new weights, where
    it is known who they are.
    """

    def mean(gathered: GatheredUpdates):
        scores = jax.vmap(score)(client_models(gathered))
        weights = jnp.where(gathered.weights > 0, weigh(gathered.weights, scores), 0.0)
        update = divided(weighted_sum(gathered.updates, weights), jnp.sum(weights))
        metrics = {}
        if "malicious" in gathered.extras:
            theirs = jnp.sum(jnp.where(gathered.extras["malicious"], weights, 0.0))
            metrics["malicious_share"] = divided(theirs, jnp.sum(weights))
        return update, metrics

    return mean


def reweighting(mean: Mean) -> Aggregator:
    """That mean alone."""
    return Aggregator(aggregate=lambda gathered, state, key: mean(gathered))


def distillation(
    loss_fn: Callable[[Tree, Tree, jax.Array], Array],
    optimizer: Optimizer,
    *,
    num_steps: int,
    teach: Teach | None = None,
    mean: Mean = weighted_mean,
) -> Aggregator:
    """The mean, then num_steps of `optimizer` (fresh in every round) on loss_fn(params, teacher, key).

    teach: what the clients' models say to the server's data in this round; None: loss_fn needs no teacher of the
    clients, and gets None. Metric: distillation_loss, of the last step. A step that is not finite changes nothing.
    Raises ValueError where num_steps < 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")

    def aggregate(gathered: GatheredUpdates, state: Tree, key: jax.Array):
        del state
        update, metrics = mean(gathered)
        teacher = None if teach is None else teach(client_models(gathered), gathered.weights)

        def step(carry, key):
            params, opt_state = carry
            loss, grad = jax.value_and_grad(loss_fn)(params, teacher, key)
            new = optimizer_step(optimizer, grad, opt_state, params)
            finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(new[0]))
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, carry), loss

        start = jax.tree.map(jnp.subtract, gathered.params, update)
        (params, _), losses = jax.lax.scan(step, (start, optimizer.init(start)), jax.random.split(key, num_steps))
        return jax.tree.map(jnp.subtract, gathered.params, params), metrics | {"distillation_loss": losses[-1]}

    return Aggregator(aggregate=aggregate)


def client_models(gathered: GatheredUpdates) -> Tree:
    """The models that the clients' deltas stand for, leaves [C, ...]; an absent client's is the server's."""
    return jax.tree.map(lambda w, delta: w[None] - delta, gathered.params, gathered.updates)
