"""LoRA factors of different ranks: what the algorithms share whose clients send factors themselves, not deltas.

A client of rank r < R trains, sends and receives the first r columns of every lora_a and rows of every lora_b; the
others are zeros. The rank is what the algorithm keeps at the client.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.fed.algorithms.lora.factors import factor_bits, full_rank, keep_rank, pairs_of
from fmfl_jax.fed.core.client import Training, start_training, train_step
from fmfl_jax.fed.core.types import (
    Array,
    ClientContext,
    ClientUpdate,
    FederatedAlgorithm,
    GatheredUpdates,
    GradFn,
    Metrics,
    Optimizer,
    Phase,
    ServerState,
    Traffic,
    Tree,
)


def ranked_factors(
    client: ClientUpdate,
    aggregate: Callable[[GatheredUpdates, jax.Array], tuple[Tree, Metrics]],
    *,
    ranks: tuple[int, ...] | None,
    prunes: bool = False,
) -> FederatedAlgorithm:
    """The algorithm whose server's new factors are what `aggregate` makes of the clients'. ranks: of every client at
    the start, by client id; None: that of the parameters. prunes: clients' ranks change.

    Its `init` raises ValueError for parameters other than factors of one rank R, and for ranks outside 1...R."""

    def init(params, seed):
        check_ranks(ranks, full_rank(params, pairs_of(params)))
        return ServerState(params, (), jnp.zeros((), jnp.int32), jnp.uint32(seed))

    def traffic(state, client_ids, client_states, cohort_size):
        pairs = pairs_of(state.params)
        start = (
            np.full(len(client_ids), full_rank(state.params, pairs)) if ranks is None else np.asarray(ranks)[client_ids]
        )
        bits = factor_bits(state.params, pairs) * (start if client_states is None else np.asarray(client_states))
        return Traffic(bits.astype(np.int64), round(float(bits.mean())))

    return FederatedAlgorithm(
        init=init,
        client=client,
        server=lambda state, aggregate: state._replace(params=aggregate.update),
        init_client=lambda params, client_id: client_rank(ranks, params, client_id),
        aggregate=aggregate,
        personal=lambda params, rank: keep_rank(params, pairs_of(params), rank),
        traffic=traffic,
        traffic_follows_states=prunes,
    )


def start_factors(optimizer: Optimizer, params: dict, rank) -> tuple[dict, Training]:
    """(the factors of a client of this rank, the same in training)."""
    start = keep_rank(params, pairs_of(params), rank)
    return start, start_training(optimizer, start)


def factors_phase(
    grad_fn: GradFn,
    optimizer: Optimizer,
    rank_of: Callable[[ClientContext], Array],
    pull: Callable[[Tree, Array], Tree] | None = None,
) -> Phase:
    """Local steps on the factors of rank_of(context); what lies beyond the rank stays 0 (a private gradient has noise).
    pull(params, rank) -> a gradient that is added."""

    def step(context, work, batch, key):
        start, training = work
        rank = rank_of(context)

        def adjust(grad, params):
            if pull is not None:
                more = pull(params, rank)
                grad = {name: grad[name] + more[name] for name in grad}
            return keep_rank(grad, pairs_of(params), rank)

        training, loss = train_step(grad_fn, optimizer, training, context.frozen, batch, key, adjust)
        return (start, training), {"loss": loss}

    return Phase(step=step)


def check_ranks(ranks: tuple[int, ...] | None, largest: int) -> None:
    """Raises ValueError where a client's rank is not one of 1...largest."""
    wrong = [rank for rank in ranks or () if not 1 <= rank <= largest]
    if wrong:
        raise ValueError(f"clients' ranks must be from 1 to the model's {largest}, got {wrong[0]}")


def client_rank(ranks: tuple[int, ...] | None, params: dict, client_id):
    """The rank, int32, of one client: `ranks`[client_id], or that of the parameters."""
    if ranks is None:
        return jnp.int32(full_rank(params, pairs_of(params)))
    return jnp.asarray(ranks, jnp.int32)[client_id]
