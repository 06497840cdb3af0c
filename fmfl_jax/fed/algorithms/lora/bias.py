"""How far an aggregation of LoRA's factors is from the mean of the matrices they stand for.

    bias = |A^ B^ - sum_c w_c A_c B_c| / |sum_c w_c A_c B_c|        A^ = A - dA, B^ = B - dB of the aggregated deltas

FedIT (Zhang et al., ICASSP 2024), which averages A and B, is fed_opt with the factors as parameters and this around
its aggregator. The norms are over all adapted matrices together.
"""

import dataclasses

import jax.numpy as jnp

from fmfl_jax.fed.algorithms.lora.factors import Factors, pairs_of, relative_distance, shares_of, stack_factors
from fmfl_jax.fed.core.reduce import gathered_mean
from fmfl_jax.fed.core.types import Aggregator, GatheredUpdates


def with_aggregation_bias(aggregator: Aggregator) -> Aggregator:
    """The same aggregator with the metric "aggregation_bias", for algorithms whose updates are deltas of LoRA factors.

    It sees the updates after the aggregator's `transform_update`, and the aggregate before its `postprocess` and before
    the server's optimizer. It needs all updates at once: a mean that streamed gathers them from then on.
    Raises ValueError, in the first round, where the trained parameters have no pair of lora_a and lora_b.
    """

    def aggregate(gathered: GatheredUpdates, state, key):
        if aggregator.aggregate is None:
            update, metrics = gathered_mean(gathered), {}
        else:
            update, metrics = aggregator.aggregate(gathered, state, key)
        return update, metrics | {"aggregation_bias": aggregation_bias(gathered, update)}

    return dataclasses.replace(aggregator, aggregate=aggregate)


def aggregation_bias(gathered: GatheredUpdates, update):
    """The bias, a float32 scalar, of `update` as the aggregate of gathered deltas; about 1e-7 for an empty cohort.

    With weights that do not add up to the denominators (inverse probabilities) the exact mean is that of the changes,
    A B + sum_c w_c (A_c B_c - A B) / sum_c n_c: the server's matrix has the rest of the weight.
    """
    shares = shares_of(gathered.weights, jnp.sum(gathered.denominators))
    shares = jnp.concatenate([1.0 - jnp.sum(shares, keepdims=True), shares])
    made, exact = [], []
    for pair in pairs_of(gathered.params):
        a, b = gathered.params[pair.a], gathered.params[pair.b]
        made.append(Factors(a - update[pair.a], b - update[pair.b]))
        exact.append(
            stack_factors(
                jnp.concatenate([a[None], a[None] - gathered.updates[pair.a]]),
                jnp.concatenate([b[None], b[None] - gathered.updates[pair.b]]),
                shares,
            )
        )
    return relative_distance(made, exact)
