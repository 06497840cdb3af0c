"""Partial models, whose parameters do not all leave the client: FedPer (Arivazhagan et al., 2019, arXiv:1912.00818),
FedRep (Collins et al., ICML 2021), FedSA-LoRA (Guo et al., ICLR 2025), and private ranks of a LoRA beside shared ones.

    (u, p_k) <- local steps from (w, p_k);   w <- server_optimizer(w, mean of w - u)

The server has the shared parameters w only; p_k stays at client k. FedPer trains both together; what it keeps are the
last layers. FedRep first takes some steps on p_k alone, then the others on u alone. FedSA-LoRA keeps every lora_b
(dW_k = A B_k). A LoRA of rank R whose last r ranks are kept adapts W by A B + A_k B_k, of ranks R - r and r. The degree
of personalization is the number of kept layers, or r / R; where nothing is kept all are FedAvg.

    >>> algorithm = partial_model(grad_fn, optax.sgd(0.1), kept={"head": params["head"]})
    >>> p = algorithm.init_client(params, client_id)
    >>> context = ClientContext(algorithm.broadcast(state), frozen, p, client_id, weight, None, key)
    >>> update, weight, p, metrics = run_client(algorithm.client, context, batches)    # update has no "head"
    >>> model = algorithm.personal(state.params, p)
"""

import jax.numpy as jnp
import optax

from fmfl_jax import streams
from fmfl_jax.fed.algorithms.fed_opt import FED_AVG, server_step, start_server
from fmfl_jax.fed.algorithms.lora.factors import full_rank, pairs_of
from fmfl_jax.fed.core.client import start_training, train_step
from fmfl_jax.fed.core.types import ClientResult, ClientUpdate, FederatedAlgorithm, GradFn, Optimizer, Phase

_SUFFIX = ".private"


def partial_model(
    grad_fn: GradFn,
    client_optimizer: Optimizer,
    server_optimizer: Optimizer = FED_AVG,
    *,
    kept: dict,
    kept_steps: int | None = None,
) -> FederatedAlgorithm:
    """The algorithm. Its `init` takes all trainable parameters, its ServerState has the shared ones.

    kept: {name: array}, the parameters that stay at the clients, as every client starts with them, and as `shared`
    shows them. kept_steps: FedRep's steps on these, over the round's batches from the first, before all batches train
    the shared ones; None trains both together.

    Raises ValueError for FedRep without kept parameters or steps, and by `init` where no parameter is shared or `kept`
    has a name that the parameters have not.
    """
    if kept_steps is None:
        begin, phases, finish = _together(grad_fn, client_optimizer, tuple(kept))
    elif kept_steps < 1 or not kept:
        raise ValueError("FedRep needs kept parameters and at least 1 step on them")
    else:
        begin, phases, finish = _one_after_the_other(grad_fn, client_optimizer, kept_steps)

    def shared_of(params: dict) -> dict:
        return {name: value for name, value in params.items() if name not in kept}

    def init(params, seed):
        if unknown := set(kept) - set(params):
            raise ValueError(f"{min(unknown)} is to be kept by the clients, but is not among the parameters")
        if not (shared := shared_of(params)):
            raise ValueError("all parameters are kept by the clients: nothing is left to share")
        return start_server(server_optimizer, shared, seed)

    return FederatedAlgorithm(
        init=init,
        client=ClientUpdate(begin=begin, phases=phases, finish=finish),
        server=lambda state, aggregate: server_step(server_optimizer, state, aggregate),
        init_client=(lambda params, client_id: {name: params[name] for name in kept}) if kept else None,
        shared=lambda params: params | kept,
        personal=(lambda params, state: params | state) if kept else None,
        update_like=shared_of,
    )


def _together(grad_fn: GradFn, optimizer: Optimizer, names: tuple[str, ...]):
    """FedPer: one optimizer trains shared and kept parameters in the same steps."""

    def begin(context):
        return start_training(optimizer, context.message | (context.state if names else {}))

    def step(context, training, batch, key):
        training, loss = train_step(grad_fn, optimizer, training, context.frozen, batch, key)
        return training, {"loss": loss}

    def finish(context, training, metrics):
        delta = {name: w - training.params[name] for name, w in context.message.items()}
        state = {name: training.params[name] for name in names} or ()
        return ClientResult(delta, context.weight, state, metrics)

    return begin, (Phase(step=step),), finish


def _one_after_the_other(grad_fn: GradFn, optimizer: Optimizer, steps: int):
    """FedRep: `steps` on the kept parameters with the shared ones held, then the others the other way round."""

    def begin(context):
        return start_training(optimizer, context.message), start_training(optimizer, context.state)

    def grad_of_one(trained, others):
        """grad_fn of one part of the parameters, the others held."""

        def grad(params, frozen, batch, key):
            loss, grad = grad_fn(params | others, frozen, batch, key)
            return loss, {name: grad[name] for name in trained}

        return grad

    def kept_step(context, work, batch, key):
        shared, kept = work
        grad = grad_of_one(context.state, context.message)
        kept, loss = train_step(grad, optimizer, kept, context.frozen, batch, key)
        return (shared, kept), {"private_loss": loss}

    def shared_step(context, work, batch, key):
        shared, kept = work
        grad = grad_of_one(context.message, kept.params)
        shared, loss = train_step(grad, optimizer, shared, context.frozen, batch, key)
        return (shared, kept), {"loss": loss}

    def finish(context, work, metrics):
        shared, kept = work
        delta = optax.tree.sub(context.message, shared.params)
        return ClientResult(delta, context.weight, kept.params, metrics)

    phases = (Phase(step=kept_step, num_steps=steps, stream=streams.PERSONAL), Phase(step=shared_step))
    return begin, phases, finish


def split_ranks(params: dict, private_rank: int) -> tuple[dict, dict]:
    """(shared, private) of LoRA's parameters: the last private_rank columns of every lora_a [D, R] and rows of every
    lora_b [R, F] under other names, in the private part. Both together are what `private` trains.

    Raises ValueError for anything but LoRA factors of one rank R, and unless 0 <= private_rank < R.
    """
    pairs = pairs_of(params)
    rank = full_rank(params, pairs)
    if not 0 <= private_rank < rank:
        raise ValueError(f"the private rank must be 0 to {rank - 1}, below the LoRA's rank {rank}, got {private_rank}")
    if private_rank == 0:
        return dict(params), {}
    shared, private, kept = {}, {}, rank - private_rank
    for a, b in pairs:
        shared |= {a: params[a][:, :kept], b: params[b][:kept]}
        private |= {a + _SUFFIX: params[a][:, kept:], b + _SUFFIX: params[b][kept:]}
    return shared, private


def join_ranks(params: dict) -> dict:
    """The inverse, of both parts in one dictionary: A beside A_k, B above B_k; their product is A B + A_k B_k."""
    joined = {}
    for name, value in params.items():
        if name.endswith(_SUFFIX):
            continue
        pieces = [value, params[name + _SUFFIX]] if name + _SUFFIX in params else [value]
        joined[name] = jnp.concatenate(pieces, axis=1 if name.endswith("lora_a") else 0)
    return joined
