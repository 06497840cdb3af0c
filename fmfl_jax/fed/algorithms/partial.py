"""Parameters that never leave the client: FedPer (Arivazhagan et al., 2019, arXiv:1912.00818), FedRep (Collins et al.,
ICML 2021), FedSA-LoRA (Guo et al., ICLR 2025), and private ranks of a LoRA beside shared ones.

    (u, p_k) <- local steps from (w, p_k);   w <- server_optimizer(w, mean of w - u)

The server has the shared parameters w only; p_k stays at client k. FedPer trains both together; its private part are
the last layers. FedRep first takes some steps on p_k alone, then the others on u alone. FedSA-LoRA keeps every lora_b
(dW_k = A B_k). A LoRA of rank R whose last r ranks are private adapts W by A B + A_k B_k, of ranks R - r and r. The
degree of personalization is the number of private layers, or r / R; without private parameters all are FedAvg.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fmfl_jax.fed.algorithms.lora.factors import full_rank, pairs_of
from fmfl_jax.fed.core.client import first_batches, local_update
from fmfl_jax.fed.core.round import make_algorithm
from fmfl_jax.fed.core.types import ClientResult, Delivery, FederatedAlgorithm
from fmfl_jax.optimize import optimizer_step

_PRIVATE = 2**30  # folded into keys; local steps stay below
_SUFFIX = ".private"


def private(
    grad_fn: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    initial: dict,
    private_steps: int | None = None,
    delivery: Delivery = Delivery(),
) -> FederatedAlgorithm:
    """The algorithm. Its `init` takes all trainable parameters, its ServerState has the shared ones.

    initial: {name: array}, the private parameters as every client starts with them, and as `shared` shows them.
    private_steps: FedRep's steps on the private ones, over the round's batches from the first, before all batches train
    the shared ones; None trains both together.

    Raises ValueError for FedRep without private parameters or steps, and by `init` where no parameter is shared or
    `initial` has a name that the parameters have not.
    """
    if private_steps is not None and (private_steps < 1 or not initial):
        raise ValueError("FedRep needs private parameters and at least 1 step on them")
    server_optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer

    def shared_of(params: dict) -> dict:
        return {name: value for name, value in params.items() if name not in initial}

    def private_of(params: dict) -> dict:
        return {name: params[name] for name in initial}

    def part(which: Callable, others: dict) -> Callable:
        """grad_fn of one part of the parameters, the others held."""

        def of_part(params, frozen, batch, key):
            loss, grad = grad_fn(params | others, frozen, batch, key)
            return loss, which(grad)

        return of_part

    def client(state, frozen, own, key) -> ClientResult:
        kept, num_steps = own.client_states if initial else {}, own.extras.get("num_steps")
        if private_steps is None:
            update = local_update(
                grad_fn, client_optimizer, state.params | kept, frozen, own.batches, key, num_steps=num_steps
            )
            return ClientResult(
                shared_of(update.delta),
                {"loss": update.loss},
                jax.tree.map(jnp.subtract, kept, private_of(update.delta)),
            )
        first = local_update(
            part(private_of, state.params),
            client_optimizer,
            kept,
            frozen,
            first_batches(own.batches, private_steps, num_steps),
            jax.random.fold_in(key, _PRIVATE),
        )
        kept = jax.tree.map(jnp.subtract, kept, first.delta)
        update = local_update(
            part(shared_of, kept), client_optimizer, state.params, frozen, own.batches, key, num_steps=num_steps
        )
        return ClientResult(update.delta, {"loss": update.loss, "private_loss": first.loss}, kept)

    def init_server(params):
        if unknown := set(initial) - set(params):
            raise ValueError(f"{min(unknown)} is to be private, but is not among the parameters")
        if not (shared := shared_of(params)):
            raise ValueError("all parameters are private: nothing is left to share")
        return shared, server_optimizer.init(shared), ()

    def server(state, update):
        return *optimizer_step(server_optimizer, update, state.opt_state, state.params), ()

    return make_algorithm(
        client,
        server,
        init_server=init_server,
        init_own=(lambda params, client_id: private_of(params)) if initial else None,
        message_like=shared_of,
        download=lambda params, extra: shared_of(params),
        shared=lambda params: params | initial,
        personal=(lambda params, own: params | own) if initial else None,
        delivery=delivery,
    )


def split_ranks(params: dict, private_rank: int) -> tuple[dict, dict]:
    """(shared, private) of LoRA's parameters: the last private_rank columns of every lora_a [D, R] and rows of every
    lora_b [R, F] under names of their own, in the private part. Both together are what `private` trains.

    Raises ValueError for anything but LoRA factors of one rank R, and unless 0 <= private_rank < R.
    """
    pairs = pairs_of(params)
    rank = full_rank(params, pairs)
    if not 0 <= private_rank < rank:
        raise ValueError(f"the private rank must be 0 to {rank - 1}, below the LoRA's rank {rank}, got {private_rank}")
    if private_rank == 0:
        return dict(params), {}
    shared, own, kept = {}, {}, rank - private_rank
    for a, b in pairs:
        shared |= {a: params[a][:, :kept], b: params[b][:kept]}
        own |= {a + _SUFFIX: params[a][:, kept:], b + _SUFFIX: params[b][kept:]}
    return shared, own


def join_ranks(params: dict) -> dict:
    """The inverse, of both parts in one dictionary: A beside A_k, B above B_k; their product is A B + A_k B_k."""
    joined = {}
    for name, value in params.items():
        if name.endswith(_SUFFIX):
            continue
        pieces = [value, params[name + _SUFFIX]] if name + _SUFFIX in params else [value]
        joined[name] = jnp.concatenate(pieces, axis=1 if name.endswith("lora_a") else 0)
    return joined
