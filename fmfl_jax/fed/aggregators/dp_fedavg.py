"""DP-FedAvg (McMahan et al., ICLR 2018) with adaptive clipping (Andrew et al., NeurIPS 2021), as an `Aggregator`.

    update = 1 / m (sum_c w_c clip(d_c, C) + N(0, (z_d C)^2 I)),   0 <= w_c <= 1,   m = q N
    C <- C exp(-eta (b - gamma)),   b = 1/2 + 1 / m (sum_c w_c (1[||d_c|| <= C] - 1/2) + N(0, s_b^2))
    z_d = (z^-2 - (2 s_b)^-2)^(-1/2)

Every client takes part in a round with probability q, independently of the others (data/batches.py:poisson_cohort).
The unit of privacy is a client with all its data: adding or removing one moves the sum by at most C, whatever the
others sent, because the denominator m is fixed and no weight is above 1. Fixed clipping has z_d = z. Adaptive clipping
releases the bits as well; together both cost as much as one release with the noise multiplier z, so z is what is
accounted for (accounting.py) in either case.

What the guarantee covers are the server's parameters and what follows from them. A round's other metrics (loss, the
number of clients, clipped_share) are the simulation's view, without noise.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.fed.core.types import Aggregate, Aggregator
from fmfl_jax.fed.privacy.clipping import add_noise, clip_by_norm
from fmfl_jax.finite import finite_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class AdaptiveClipping:
    """quantile: gamma, the share of updates that should stay unclipped. learning_rate: eta. bits_std: s_b, of the noise
    on the sum of the bits; None: m / 20, as published."""

    quantile: float = 0.5
    learning_rate: float = 0.2
    bits_std: float | None = None

    def __post_init__(self):
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile is {self.quantile}: expected 0 to 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}: expected a positive number")
        if self.bits_std is not None and not self.bits_std >= 0:
            raise ValueError(f"bits_std is {self.bits_std}: expected at least 0")


class ClippingState(NamedTuple):
    """clip_norm: float32 scalar, C of the next round."""

    clip_norm: jax.Array


def update_noise_multiplier(noise_multiplier: float, bits_std: float) -> float:
    """z_d: the noise multiplier of the update when bits with noise `bits_std` are released beside it and both together
    are to cost as much as one release with `noise_multiplier`.

    Raises ValueError where the bits alone cost more than that.
    """
    if noise_multiplier == 0:
        return 0.0
    if not noise_multiplier < 2 * bits_std:
        raise ValueError(
            f"the bits of adaptive clipping alone cost more than the noise multiplier {noise_multiplier} "
            f"allows: it must be below 2 bits_std = {2 * bits_std}. Raise bits_std (it blurs the "
            "quantile), take larger cohorts, or clip at a fixed norm"
        )
    return (noise_multiplier**-2 - (2 * bits_std) ** -2) ** -0.5


def dp_fedavg(
    *,
    clip_norm: float,
    noise_multiplier: float,
    expected_cohort: float,
    weighting: str = "uniform",
    cap: float | None = None,
    adaptive: AdaptiveClipping | None = None,
    slack: float = 0.0,
) -> Aggregator:
    """The aggregator.

    clip_norm: C, with adaptive clipping that of the first round. noise_multiplier: z, noise / sensitivity; 0 is no
      noise and no privacy. expected_cohort: m = q N, the denominator, fixed whoever takes part.
    weighting: "uniform", every client counts 1, or "capped", min(n, cap) / cap for n examples.
    slack: what an update's norm may grow by after it was clipped, before all are summed: the rounding of secure
      aggregation. The noise covers C + slack.

    The metrics have clip_norm (of this round), noise_std (of each value of the update), clipped_share (of the clients
    delivered, weighted; exact, hence not private) and with adaptive clipping private_unclipped_share (b).

    Raises ValueError for weights by data size, and for numbers out of range.
    """
    _check(clip_norm, noise_multiplier, expected_cohort, weighting, cap, slack)
    bits_std, z_update = _split_noise(noise_multiplier, expected_cohort, adaptive)

    def init(template):
        del template
        return ClippingState(jnp.float32(clip_norm))

    def transform_update(update, state: ClippingState):
        update, norm = clip_by_norm(update, state.clip_norm)
        return update, {"clipped_share": (norm > state.clip_norm).astype(jnp.float32)}

    def postprocess(mean: Aggregate, state: ClippingState, key):
        update_key, bits_key = jax.random.split(key)
        std = jnp.float32(z_update / expected_cohort) * (state.clip_norm + jnp.float32(slack))
        rescale = mean.denominator / jnp.float32(expected_cohort)  # the sum, over what was expected
        update = add_noise(jax.tree.map(lambda x: x * rescale.astype(x.dtype), mean.update), std, update_key)
        metrics = {"clip_norm": state.clip_norm, "noise_std": std}
        if adaptive is None:
            return update, state, metrics
        bits = mean.weight * (0.5 - mean.metrics["clipped_share"])  # sum of w (1[unclipped] - 1/2)
        noise = jnp.float32(bits_std) * jax.random.normal(bits_key, (), jnp.float32)
        unclipped = 0.5 + (bits + noise) / jnp.float32(expected_cohort)
        change = jnp.exp(-jnp.float32(adaptive.learning_rate) * (unclipped - jnp.float32(adaptive.quantile)))
        return update, ClippingState(state.clip_norm * change), metrics | {"private_unclipped_share": unclipped}

    return Aggregator(
        init=init,
        transform_update=transform_update,
        postprocess=postprocess,
        weighting=lambda num_examples: _capped_weights(num_examples, cap),
        counts_empty=True,
    )


def _capped_weights(num_examples, cap: float | None) -> np.ndarray:
    """min(n, cap) / cap, float32 [C]; 1 without a cap."""
    num_examples = np.asarray(num_examples, np.float32)
    if cap is None:
        return np.ones_like(num_examples)
    return np.minimum(num_examples, np.float32(cap)) / np.float32(cap)


def _split_noise(
    noise_multiplier: float, expected_cohort: float, adaptive: AdaptiveClipping | None
) -> tuple[float, float]:
    """(s_b, z_d)."""
    if adaptive is None:
        return 0.0, noise_multiplier
    bits_std = expected_cohort / 20 if adaptive.bits_std is None else adaptive.bits_std
    return bits_std, update_noise_multiplier(noise_multiplier, bits_std)


def _check(
    clip_norm: float, noise_multiplier: float, expected_cohort: float, weighting: str, cap: float | None, slack: float
) -> None:
    if weighting not in ("uniform", "capped"):
        raise ValueError(
            f"weighting is {weighting!r}: expected uniform or capped. Weights by data size have no bound, and neither "
            "has what one client can do to the sum: noise of any fixed size would not hide it"
        )
    if (weighting == "capped") != (cap is not None):
        raise ValueError("capped weighting needs a cap, the number of examples that counts in full; uniform takes none")
    for name, value in (("clip_norm", clip_norm), ("expected_cohort", expected_cohort), ("cap", cap)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}: expected a positive number")
    for name, value in (("noise_multiplier", noise_multiplier), ("slack", slack)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}: expected at least 0")
