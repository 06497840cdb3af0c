"""When a round ends: downlink, compute, upload, deadline, and the clients that nobody waits for.

A round lasts until the last scheduled client has finished, until the k-th arrival, or until the deadline.
"""

import jax.numpy as jnp
import numpy as np


def broadcast_time_s(payload_bits, rate_bps, selected, limit_s):
    """One transmission that all can decode, so at the rate of the worst selected client in reach.

    Args:
      payload_bits: scalar.
      rate_bps: [C].
      selected: [C] bool.
      limit_s: scalar; a client whose rate would take longer is out of reach, and nobody waits for it.

    Returns:
      [C] s, the same for all who are reached, inf for those who are not, 0 for those not selected.
    """
    reached = selected & (rate_bps > 0.0) & (payload_bits <= rate_bps * limit_s)
    worst = jnp.min(jnp.where(reached, rate_bps, jnp.inf))
    time_s = payload_bits / worst
    return jnp.where(reached, time_s, jnp.where(selected & (payload_bits > 0.0), jnp.inf, 0.0))


def unicast_time_s(payload_bits, rate_bps, selected, limit_s):
    """Each client in reach gets 1/K of band and power, so its rate is 1/K of the full-band rate.

    K is the largest number of clients that can all be done within limit_s: those with the best rates. Arguments and
    result as in `broadcast_time_s`.
    """
    wanted = jnp.where(selected, rate_bps, 0.0)
    rank = 1 + jnp.argsort(jnp.argsort(-wanted))  # with the n best served, the n-th takes n times as long
    needed = rank.astype(rate_bps.dtype) * payload_bits
    reached = (wanted > 0.0) & (needed <= wanted * limit_s)
    share = jnp.sum(reached.astype(rate_bps.dtype))
    time_s = share * payload_bits / jnp.where(reached, rate_bps, 1.0)
    return jnp.where(reached, time_s, jnp.where(selected & (payload_bits > 0.0), jnp.inf, 0.0))


def kth_smallest(values, k: int):
    """The k-th smallest of [C] (k from 1); inf entries count as never."""
    return jnp.sort(values)[min(k, values.shape[0]) - 1]


def close_round(finish_s, arrived, scheduled, deadline_s: float, wait_for: int | None):
    """When the server closes the round, and whom it heard.

    Args:
      finish_s: [C] end of each client's upload from the start of the round; of one that failed: when it gave up.
      arrived: [C] bool, the upload was received whole.
      scheduled: [C] bool; the others are not waited for.
      deadline_s: inf for none.
      wait_for: close at this many arrivals; None for all.

    Returns:
      (latency_s [], delivered [C] bool). If nobody is scheduled the round lasts until the deadline, or 0 s without one.
    """
    heard = scheduled & arrived
    last = jnp.max(jnp.where(scheduled, finish_s, 0.0))
    if wait_for is not None:
        last = jnp.minimum(last, kth_smallest(jnp.where(heard, finish_s, jnp.inf), wait_for))
    if np.isfinite(deadline_s):
        last = jnp.where(jnp.any(scheduled), jnp.minimum(last, deadline_s), deadline_s)
    return last, heard & (finish_s <= last)
