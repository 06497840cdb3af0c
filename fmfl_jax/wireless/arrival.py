"""What arrives is what is aggregated: the weights of the clients whose updates were delivered.

Every rule returns (weights [C], total []): the aggregate is sum_k weights_k delta_k / total. If everyone arrives with
probability 1, all rules return the plain FedAvg weights and their sum, bit for bit. Arrays may be JAX's or NumPy's,
which compile nothing for another number of clients.
"""

from typing import Any, NamedTuple


class Weights(NamedTuple):
    """weights: [C]; total: [] normalizer. total 0 means that nothing arrived: the model stays as it is."""

    weights: Any
    total: Any


def survivors_mean(num_examples, delivered) -> Weights:
    """Weighted mean over the survivors. **Biased** towards clients with good links when links differ: the expectation
    depends on the success probabilities. Args: num_examples [C] float, delivered [C] bool."""
    xp = num_examples.__array_namespace__()
    weights = xp.where(delivered, num_examples, xp.zeros_like(num_examples))
    return Weights(weights, xp.sum(weights))


def inverse_probability(num_examples, delivered, probability, cohort=None) -> Weights:
    """Horvitz-Thompson: weight D_k / p_k for survivors, divided by the sum of D over the whole cohort. Unbiased, with a
    variance that grows as p falls.

    Args:
      num_examples: [C] float D.
      delivered: [C] bool.
      probability: [C] of delivery, > 0 wherever delivered may be True.
      cohort: [C] bool, whom the target mean is over; all if None. A client with probability 0 cannot be represented:
        the mean is then biased by its absence, as any estimator is.
    """
    xp = num_examples.__array_namespace__()
    members = num_examples if cohort is None else xp.where(cohort, num_examples, xp.zeros_like(num_examples))
    safe = xp.where(delivered, probability, xp.ones_like(probability))
    return Weights(xp.where(delivered, members / safe, xp.zeros_like(members)), xp.sum(members))
