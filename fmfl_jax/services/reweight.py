"""Weights of client models by their accuracy on the synthetic set (section III-A).

    w_k = (1 - floor) n_k exp(acc_k / tau) / sum_j n_j exp(acc_j / tau) + floor n_k / sum_j n_j

Without the floor and with a small tau one client takes all, and under label skew the mean of that one is worse than
FedAvg's: so every client keeps `floor` of its FedAvg share. It is worth having against attackers, who score badly.

    >>> accuracy_weights(num_examples, accuracies, temperature=1.0, floor=0.2)     # sums to 1

It is JAX, and stands in a round (fed/aggregators/distillation.py, `reweighted_mean`).
"""

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.services.checks import positive, same_length, share


def accuracy_weights(num_examples, accuracies, *, temperature: float, floor: float) -> jax.Array:
    """float32 [C], sum 1: the module's formula.

    num_examples: [C] >= 0. accuracies: [C] on the synthetic set, or minus losses; one that is not finite (a model that
    broke) has weight 0, its floor too. temperature: tau > 0. floor: in [0, 1]; 1 is FedAvg. If nobody is left, all 0.

    Raises ValueError for unequal lengths, temperature <= 0 and a floor outside [0, 1]; for negative num_examples where
    they come from the host (not inside jit).
    """
    positive(temperature=temperature)
    share("floor", floor)
    if isinstance(num_examples, list | tuple | np.ndarray) and np.min(num_examples) < 0:
        raise ValueError(f"num_examples must be at least 0, got {np.min(num_examples):g}")
    n, accuracies = jnp.asarray(num_examples, jnp.float32), jnp.asarray(accuracies, jnp.float32)
    same_length(num_examples=n, accuracies=accuracies)
    n = jnp.where(jnp.isfinite(accuracies), n, 0.0)
    present = n > 0
    best = jnp.max(jnp.where(present, accuracies, -jnp.inf))
    sharp = n * jnp.exp(jnp.where(present, accuracies - best, 0.0) / temperature)
    total = lambda x: jnp.where(jnp.sum(x) > 0, jnp.sum(x), 1.0)
    return (1 - floor) * sharp / total(sharp) + floor * n / total(n)
