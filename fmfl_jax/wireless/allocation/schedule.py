"""Who uploads, when uploads follow one another and the round has a deadline: the most clients, and FedCS's greedy
choice.

Each client is ready after its compute and then needs the channel alone for its upload. Read backwards from the deadline
this is 1 | d_j | sum U_j, which Moore and Hodgson (1968) solve; forwards it has release times. FedCS: Nishio and
Yonetani, IEEE ICC 2019, Algorithm 3.
"""

import jax
import jax.numpy as jnp


def finish_times(order, ready_s, upload_s, start_s=0.0):
    """End of each upload when clients go in `order`, each waiting for the channel and for its own compute.

    Args:
      order: [C] int, a permutation.
      ready_s, upload_s: [C]; an upload of 0 s passes through.
      start_s: when the channel is free, scalar.

    Returns:
      [C] s, by client.
    """

    def upload(now, client):
        end = jnp.maximum(now, ready_s[client]) + upload_s[client]
        return end, end

    _, ends = jax.lax.scan(upload, jnp.asarray(start_s, upload_s.dtype), order)
    return jnp.zeros_like(upload_s).at[order].set(ends)


def most_clients(ready_s, upload_s, deadline_s, candidates=None):
    """The largest set of clients whose sequential uploads all end by the deadline (Moore-Hodgson in reversed time).

    Backwards from the deadline, client k must be done (that is, start its upload) within deadline - ready_k: take jobs
    by that due date, and whenever one does not fit, drop the longest so far. Optimal. n steps of vector work on n
    entries.

    Args:
      ready_s, upload_s: [C] s.
      deadline_s: scalar, finite or inf.
      candidates: [C] bool, all if None.

    Returns:
      (chosen [C] bool, order [C] int32): uploading the chosen in that order meets the deadline.
    """
    allowed = jnp.ones(ready_s.shape, bool) if candidates is None else candidates
    allowed = allowed & jnp.isfinite(upload_s) & jnp.isfinite(ready_s)
    due = deadline_s - ready_s
    by_due = jnp.argsort(jnp.where(allowed, due, jnp.inf)).astype(jnp.int32)

    def consider(carry, client):
        chosen, total = carry
        chosen = chosen.at[client].set(allowed[client])
        total = total + jnp.where(allowed[client], upload_s[client], 0.0)
        late = total > due[client]
        longest = jnp.argmax(jnp.where(chosen, upload_s, -1.0))
        drop = late & allowed[client]
        chosen = chosen.at[longest].set(jnp.where(drop, False, chosen[longest]))
        return (chosen, total - jnp.where(drop, upload_s[longest], 0.0)), None

    start = (jnp.zeros(ready_s.shape, bool), jnp.zeros((), upload_s.dtype))
    (chosen, _), _ = jax.lax.scan(consider, start, by_due)
    # Due dates rise backwards in time, so ready times fall: forwards, the chosen go by rising ready time.
    order = jnp.argsort(jnp.where(chosen, ready_s, jnp.inf)).astype(jnp.int32)
    return chosen, order


def fedcs_greedy(ready_s, upload_s, deadline_s, candidates=None):
    """FedCS: repeatedly the client that adds the least time, kept if the round still meets the deadline.

    The added time is upload + max(0, ready - now). Not optimal (facts: worse than `most_clients` on 33 % of random
    instances); here to compare and to reproduce.

    Returns:
      (chosen [C] bool, order [C] int32: the order of choice, the chosen first).
    """
    allowed = jnp.ones(ready_s.shape, bool) if candidates is None else candidates
    allowed = allowed & jnp.isfinite(upload_s) & jnp.isfinite(ready_s)
    num_clients = ready_s.shape[0]

    def pick(step, carry):
        left, chosen, rank, now = carry
        added = upload_s + jnp.maximum(ready_s - now, 0.0)
        best = jnp.argmin(jnp.where(left, added, jnp.inf))
        end = now + added[best]
        keep = left[best] & (end <= deadline_s)
        rank = rank.at[best].set(jnp.where(keep, step, rank[best]))
        return left.at[best].set(False), chosen.at[best].set(keep | chosen[best]), rank, jnp.where(keep, end, now)

    start = (
        allowed,
        jnp.zeros(ready_s.shape, bool),
        jnp.full(ready_s.shape, num_clients, jnp.int32),
        jnp.zeros((), upload_s.dtype),
    )
    _, chosen, rank, _ = jax.lax.fori_loop(0, num_clients, pick, start)
    return chosen, jnp.argsort(rank).astype(jnp.int32)
