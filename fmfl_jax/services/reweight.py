"""Weights of client models by their accuracy on the synthetic set (section III-A).

    w_k = (1 - floor) n_k exp(acc_k / tau) / sum_j n_j exp(acc_j / tau) + floor n_k / sum_j n_j

Without the floor and with a small tau one client takes all, and under label skew the mean of that one is worse than
FedAvg's: so every client keeps `floor` of its FedAvg share. It is worth having against attackers, who score badly.

    >>> accuracy_weights(num_examples, accuracies, temperature=1.0, floor=0.2)     # sums to 1
"""

import numpy as np

from fmfl_jax.services.checks import positive, same_length, share, vector


def accuracy_weights(num_examples, accuracies, *, temperature: float, floor: float) -> np.ndarray:
    """float64 [C], sum 1: the module's formula.

    num_examples: [C] >= 0. accuracies: [C] on the synthetic set, or minus losses; one that is not finite (a model that
    broke) has weight 0, its floor too. temperature: tau > 0. floor: in [0, 1]; 1 is FedAvg. If nobody is left, all 0.

    Raises ValueError for negative num_examples, unequal lengths, temperature <= 0 and a floor outside [0, 1].
    """
    n, accuracies = vector("num_examples", num_examples), np.asarray(accuracies, np.float64)
    same_length(num_examples=n, accuracies=accuracies)
    positive(temperature=temperature)
    share("floor", floor)
    if n.min() < 0:
        raise ValueError(f"num_examples must be at least 0, got {n.min():g}")
    n = np.where(np.isfinite(accuracies), n, 0.0)
    if not n.any():
        return np.zeros_like(n)
    present = n > 0
    best = accuracies[present].max()
    sharp = n * np.exp((np.where(present, accuracies, best) - best) / temperature)
    return (1 - floor) * sharp / sharp.sum() + floor * n / n.sum()
