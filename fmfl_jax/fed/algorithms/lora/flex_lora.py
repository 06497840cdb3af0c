"""FlexLoRA (Bai et al., NeurIPS 2024): the mean of the matrices, given out again at every client's rank by SVD.

    dW = sum_c n_c A_c B_c / sum_c n_c = U S V^T;    client k starts from A = U[:, :r_k], B = S[:r_k] V[:, :r_k]^T

The server keeps the first R directions. The SVD is by QR of the stacked factors: no dense dW is ever made. A new rank
is only a shorter or longer start, so clients of all ranks train in one cohort. dW = scale A B with one scale for all
ranks, the model's own (alpha / R): factors written out for a model with alpha / r_k need lora_b times r_k / R.

    >>> algorithm = flex_lora(grad_fn, optax.sgd(0.1), ranks=(2, 4, 8))
    >>> rank = algorithm.init_client(params, client_id)
    >>> context = ClientContext(algorithm.broadcast(state), frozen, rank, client_id, weight, None, key)
    >>> factors = run_client(algorithm.client, context, batches).update
"""

import jax.numpy as jnp

from fmfl_jax.fed.algorithms.lora.factors import (
    Factors,
    difference,
    joint_norm,
    pairs_of,
    ratio,
    shares_of,
    stack_factors,
    traced_bits,
    truncated_svd,
)
from fmfl_jax.fed.algorithms.lora.ranked import factors_phase, ranked_factors, start_factors
from fmfl_jax.fed.core.types import (
    ClientResult,
    ClientUpdate,
    FederatedAlgorithm,
    GatheredUpdates,
    GradFn,
    Optimizer,
)


def flex_lora(
    grad_fn: GradFn, client_optimizer: Optimizer, *, ranks: tuple[int, ...] | None = None
) -> FederatedAlgorithm:
    """The algorithm. Its parameters are LoRA factors of one rank R and nothing else.

    ranks: of every client, by client id; None: R for all. The mean is over the valid clients, whatever the
    denominators: it is of whole matrices, not of changes. Client metrics: "payload_bits" and "download_bits" of the
    client's rank. Metrics: "aggregation_bias", what the truncation to R leaves out, relative to the mean; "delta_norm",
    of the change of all A B.
    `init` raises ValueError for other parameters and for ranks outside 1...R.
    """

    def begin(context):
        return start_factors(client_optimizer, context.message, context.state)

    def finish(context, work, metrics):
        start, training = work
        bits = traced_bits(start, pairs_of(start), context.state)
        metrics = metrics | {"payload_bits": bits, "download_bits": bits}
        return ClientResult(training.params, context.weight, context.state, metrics)

    steps = factors_phase(grad_fn, client_optimizer, lambda context: context.state)
    return ranked_factors(ClientUpdate(begin=begin, phases=(steps,), finish=finish), truncated_mean, ranks=ranks)


def truncated_mean(gathered: GatheredUpdates, key):
    """(the server's new factors, metrics) of the clients' factors."""
    del key
    pairs, shares = pairs_of(gathered.params), shares_of(gathered.weights, jnp.sum(gathered.weights))
    update, changes, left_out, whole = {}, [], [], []
    for pair in pairs:
        mean = stack_factors(gathered.updates[pair.a], gathered.updates[pair.b], shares)
        rank = gathered.params[pair.a].shape[1]
        kept, values = truncated_svd(mean, rank)
        update[pair.a], update[pair.b] = kept
        changes.append(difference(kept, Factors(gathered.params[pair.a], gathered.params[pair.b])))
        left_out.append(values[rank:])
        whole.append(values)
    bias = ratio(jnp.linalg.norm(jnp.concatenate(left_out)), jnp.linalg.norm(jnp.concatenate(whole)))
    moved = jnp.where(jnp.sum(gathered.weights) > 0, joint_norm(changes), 0.0)
    return update, {"aggregation_bias": bias, "delta_norm": moved}
