"""How far an aggregation of LoRA's factors is from the mean of the matrices they stand for.

    bias = |A^ B^ - sum_c w_c A_c B_c| / |sum_c w_c A_c B_c|        A^ = A - dA, B^ = B - dB of the aggregated deltas

FedIT (Zhang et al., ICASSP 2024), which averages A and B, is fed_opt with the factors as parameters and this around
its aggregator. The norms are over all adapted matrices together.
"""

import dataclasses

import jax.numpy as jnp

from fmfl_jax.fed.algorithms.lora.factors import Factors, pairs_of, relative_distance, shares_of, stack_factors
from fmfl_jax.fed.core.reduce import stack_mean
from fmfl_jax.fed.core.types import Aggregator, Stack


def with_aggregation_bias(aggregator: Aggregator) -> Aggregator:
    """The same aggregator with the metric "aggregation_bias", for algorithms whose messages are deltas of LoRA factors.

    It sees the messages after the aggregator's `each` and the update before its `finish` and before the server's
    optimizer. It needs all messages at once: a mean that streamed is stacked from then on.
    Raises ValueError, in the first round, where the trained parameters have no pair of lora_a and lora_b.
    """

    def combine(stack: Stack, state, key):
        if aggregator.combine is None:
            update, found = stack_mean(stack), {}
        else:
            update, found = aggregator.combine(stack, state, key)
        return update, found | {"aggregation_bias": aggregation_bias(stack, update)}

    return dataclasses.replace(aggregator, combine=combine)


def aggregation_bias(stack: Stack, update):
    """The bias, a float32 scalar, of `update` as the aggregate of a stack of deltas; about 1e-7 for an empty cohort.

    With weights that do not add up to the normalizers (inverse probabilities) the exact mean is that of the changes,
    A B + sum_c w_c (A_c B_c - A B) / sum_c n_c: the server's own matrix has the rest of the weight.
    """
    shares = shares_of(stack.weights, jnp.sum(stack.normalizers))
    shares = jnp.concatenate([1.0 - jnp.sum(shares, keepdims=True), shares])
    made, exact = [], []
    for pair in pairs_of(stack.params):
        a, b = stack.params[pair.a], stack.params[pair.b]
        made.append(Factors(a - update[pair.a], b - update[pair.b]))
        exact.append(
            stack_factors(
                jnp.concatenate([a[None], a[None] - stack.messages[pair.a]]),
                jnp.concatenate([b[None], b[None] - stack.messages[pair.b]]),
                shares,
            )
        )
    return relative_distance(made, exact)
