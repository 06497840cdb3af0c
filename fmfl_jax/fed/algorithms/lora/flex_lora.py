"""FlexLoRA (Bai et al., NeurIPS 2024): the mean of the matrices, given out again at every client's rank by SVD.

    dW = sum_c n_c A_c B_c / sum_c n_c = U S V^T;    client k starts from A = U[:, :r_k], B = S[:r_k] V[:, :r_k]^T

The server keeps the first R directions. The SVD is by QR of the stacked factors: no dense dW is ever made. A new rank
is only a shorter or longer start, so clients of all ranks train in one cohort. dW = scale A B with one scale for all
ranks, the model's own (alpha / R): factors written out for a model with alpha / r_k need lora_b times r_k / R.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from fmfl_jax.fed.algorithms.lora.factors import (
    Factors,
    difference,
    joint_norm,
    keep_rank,
    pairs_of,
    ratio,
    shares_of,
    stack_factors,
    traced_bits,
    truncated_svd,
)
from fmfl_jax.fed.algorithms.lora.ranked import of_ranked_factors
from fmfl_jax.fed.core.client import local_update
from fmfl_jax.fed.core.types import ClientResult, Delivery, FederatedAlgorithm, Stack


def flex_lora(
    grad_fn: Callable,
    client_optimizer: optax.GradientTransformation,
    *,
    ranks: tuple[int, ...] | None = None,
    delivery: Delivery = Delivery(),
) -> FederatedAlgorithm:
    """The algorithm. Its parameters are LoRA factors of one rank R and nothing else.

    ranks: of every client, by client id; None: R for all. The mean is over those who are heard, whatever the
    normalizers: it is of whole matrices, not of changes. Scalars: "payload_bits" and "download_bits" of the client's
    rank. Metrics: "aggregation_bias", what the truncation to R leaves out, relative to the mean; "delta_norm", of the
    change of all A B.
    Raises ValueError for other parameters, ranks outside 1...R, and what `with_own_aggregator` refuses.
    """

    def client(state, frozen, own, key) -> ClientResult:
        pairs, rank = pairs_of(state.params), own.client_states
        start = keep_rank(state.params, pairs, rank)
        update = local_update(
            grad_fn,
            client_optimizer,
            start,
            frozen,
            own.batches,
            key,
            adjust=lambda grad, params: keep_rank(grad, pairs, rank),  # a private gradient has noise
            num_steps=own.extras.get("num_steps"),
        )
        bits = traced_bits(start, pairs, rank)
        factors = {name: start[name] - update.delta[name] for name in start}
        return ClientResult(factors, {"loss": update.loss, "payload_bits": bits, "download_bits": bits}, rank)

    return of_ranked_factors(client, combine, ranks=ranks, delivery=delivery, name="FlexLoRA")


def combine(stack: Stack, state, key):
    """(the server's new factors, metrics) of a stack of clients' factors."""
    pairs, shares = pairs_of(stack.params), shares_of(stack.weights, jnp.sum(stack.weights))
    update, changes, left_out, whole = {}, [], [], []
    for pair in pairs:
        mean = stack_factors(stack.messages[pair.a], stack.messages[pair.b], shares)
        rank = stack.params[pair.a].shape[1]
        kept, values = truncated_svd(mean, rank)
        update[pair.a], update[pair.b] = kept
        changes.append(difference(kept, Factors(stack.params[pair.a], stack.params[pair.b])))
        left_out.append(values[rank:])
        whole.append(values)
    bias = ratio(jnp.linalg.norm(jnp.concatenate(left_out)), jnp.linalg.norm(jnp.concatenate(whole)))
    moved = jnp.where(jnp.sum(stack.weights) > 0, joint_norm(changes), 0.0)
    return update, {"aggregation_bias": bias, "delta_norm": moved}
