"""Over-the-air computation as an aggregator: the channel adds the updates, the receiver gets the sum and noise.

Optimal power control (Cao et al., IEEE TWC 2020) or truncated channel inversion (Zhu et al., arXiv 1812.11494), see
wireless/over_the_air.py. A client scales its update by its weight before it sends, so the sum is the weighted mean;
all scale by one common number, the largest root mean square, which is side information. Clients that are not there are
silent: they neither add to the sum nor hold the power of the others down.
"""

import jax
import jax.numpy as jnp

from fmfl_jax.fed.core.types import Aggregator, GatheredUpdates
from fmfl_jax.wireless.over_the_air import aircomp_mean, truncated_mean

_SILENT_SNR = 1e12  # of who is not there: never the weakest
TRUNCATION = 0.1  # fades |h|^2 below are not inverted: 9.5 % of the symbols are not sent


def over_the_air(*, truncated: bool) -> Aggregator:
    """The aggregator; GatheredUpdates.extras["snr"] float32 [C] is each client's receive SNR at full power, linear."""

    def aggregate(gathered: GatheredUpdates, state, key):
        del state
        present = gathered.weights > 0
        count = jnp.maximum(jnp.sum(present.astype(jnp.float32)), 1.0)
        total = jnp.sum(gathered.weights)
        share = gathered.weights * count / jnp.where(total > 0, total, 1.0)  # 1 where all weigh the same
        scaled = jax.tree.map(lambda x: share.reshape(-1, *(1,) * (x.ndim - 1)) * x, gathered.updates)
        snr = jnp.where(present, gathered.extras["snr"], jnp.float32(_SILENT_SNR))
        one, noise = jnp.ones_like(snr), jnp.float32(1.0)
        if truncated:
            mean = truncated_mean(key, scaled, snr, one, noise, jnp.float32(TRUNCATION), gathered.client_ids)
        else:
            mean, _ = aircomp_mean(key, scaled, snr, one, noise)
        rescale = jnp.where(total > 0, snr.shape[0] / count, 0.0)
        return jax.tree.map(lambda x: rescale * x, mean), {}

    return Aggregator(aggregate=aggregate)
