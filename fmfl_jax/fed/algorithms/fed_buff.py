"""FedBuff (Nguyen et al., AISTATS 2022): asynchronous rounds with a buffer.

    w <- server_optimizer(w, 1/K sum_k (1 + tau_k)^(-1/2) (w_k^start - w_k^end))

A client starts from the parameters that the server had when it began, and its update counts when it is done: tau_k
server steps later. A round here is one server step on the K updates that filled the buffer. Who they are, and how
stale, is the caller's: the cohort's weights are `staleness_weight(tau)` with normalizers 1, and client_states are the
parameters that each started from.
"""

from collections.abc import Callable

import jax
import numpy as np
import optax

from fmfl_jax.fed.algorithms.fed_opt import with_server
from fmfl_jax.fed.core.client import local_update
from fmfl_jax.fed.core.types import ClientResult, Delivery, FederatedAlgorithm


def fed_buff(
    grad_fn: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    delivery: Delivery = Delivery(),
) -> FederatedAlgorithm:
    """The algorithm. What a client keeps are the parameters it started from; see `started`."""

    def client(state, frozen, own, key) -> ClientResult:
        start = own.client_states
        update = local_update(
            grad_fn, client_optimizer, start, frozen, own.batches, key, num_steps=own.extras.get("num_steps")
        )
        return ClientResult(update.delta, {"loss": update.loss}, start)

    return with_server(client, server_optimizer, init_own=lambda params, client_id: params, delivery=delivery)


def started(rows: dict, params: dict) -> dict:
    """The states [C, ...] of clients that start from `params` now, whatever else they keep."""
    count = len(jax.tree.leaves(rows)[0])
    return rows | {"own": jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], count, axis=0), params)}


def staleness_weight(staleness) -> np.ndarray:
    """1 / sqrt(1 + tau), float32."""
    return (1 / np.sqrt(1 + np.asarray(staleness))).astype(np.float32)
