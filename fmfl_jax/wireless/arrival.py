"""What arrives is what is aggregated: weights for the clients that were heard, and deltas for those that were not.

Every rule returns (weights [C], total []): the aggregate is sum_k weights_k delta_k / total. If everyone arrives with
probability 1, all rules return the plain FedAvg weights and their sum, bit for bit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Weights(NamedTuple):
    """weights: [C]; total: [] normalizer. total 0 means that nothing arrived: the model stays as it is."""

    weights: jax.Array
    total: jax.Array


def survivors_mean(num_examples, delivered) -> Weights:
    """Weighted mean over the survivors. **Biased** towards clients with good links when links differ: the expectation
    depends on the success probabilities. Args: num_examples [C] float, delivered [C] bool."""
    weights = jnp.where(delivered, num_examples, jnp.zeros_like(num_examples))
    return Weights(weights, jnp.sum(weights))


def inverse_probability(num_examples, delivered, probability, cohort=None) -> Weights:
    """Horvitz-Thompson: weight D_k / p_k for survivors, divided by the sum of D over the whole cohort. Unbiased, with a
    variance that grows as p falls.

    Args:
      num_examples: [C] float D.
      delivered: [C] bool.
      probability: [C] of delivery, > 0 wherever delivered may be True.
      cohort: [C] bool, whom the target mean is over; all if None. A client with probability 0 cannot be represented:
        the
        mean is then biased by its absence, as any estimator is.
    """
    members = num_examples if cohort is None else jnp.where(cohort, num_examples, jnp.zeros_like(num_examples))
    safe = jnp.where(delivered, probability, jnp.ones_like(probability))
    return Weights(jnp.where(delivered, members / safe, jnp.zeros_like(members)), jnp.sum(members))


def all_with_substitutes(num_examples, cohort=None) -> Weights:
    """Weights for `substitute_last`: everyone counts, with a fresh or an old delta."""
    weights = num_examples if cohort is None else jnp.where(cohort, num_examples, jnp.zeros_like(num_examples))
    return Weights(weights, jnp.sum(weights))


def _like(mask, leaf):
    """[C] -> [C, 1, ...] to broadcast against a leaf [C, ...]."""
    return mask.reshape(mask.shape + (1,) * (leaf.ndim - 1))


def substitute_last(deltas, last_deltas, delivered):
    """Puts each lost client's last delta that arrived in place of the lost one (zeros before the first).

    Args:
      deltas, last_deltas: pytrees of [C, ...]; start with `jax.tree.map(jnp.zeros_like, deltas)`.
      delivered: [C] bool.

    Returns:
      filled deltas, which are also the new last_deltas.
    """
    return jax.tree.map(lambda new, old: jnp.where(_like(delivered, new), new, old), deltas, last_deltas)


def aggregate(deltas, weights: Weights):
    """sum_k w_k delta_k / total over pytrees of [C, ...] -> [...]; zeros where nothing arrived.

    Weight 0 removes a client altogether: what did not arrive may be anything, NaN included.
    """
    empty = weights.total == 0.0
    total = jnp.where(empty, jnp.ones_like(weights.total), weights.total)

    def mean(leaf):
        weight = weights.weights.astype(leaf.dtype)
        kept = jnp.where(_like(weight, leaf) == 0.0, jnp.zeros_like(leaf), leaf)
        summed = jnp.sum(_like(weight, leaf) * kept, axis=0)
        return jnp.where(empty, jnp.zeros_like(summed), summed / total.astype(leaf.dtype))

    return jax.tree.map(mean, deltas)
