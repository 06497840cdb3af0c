"""Scaled dot-product attention with grouped queries, causal, in float32 softmax."""

import math

import jax
import jax.numpy as jnp


def attend(q, key, value, *, query_positions=None, prefix=None):
    """q [B, T, N, H], key and value [B, S, K, H] -> [B, T, N, H]; N a multiple of K.

    Causal: query t sees slots s <= query_positions[b, t] (int32 [B, T]; default t itself, S = T). `prefix` is None or
    (keys, values), [P, K, H] each, seen by every query.
    """
    b, t, n, h = q.shape
    k = key.shape[2]
    q = q.reshape(b, t, k, n // k, h)  # [B, T, K, N/K, H]
    scores = jnp.einsum("btkgh,bskh->bkgts", q, key, preferred_element_type=jnp.float32) / math.sqrt(h)
    slots = jnp.arange(key.shape[1], dtype=jnp.int32)
    if query_positions is None:
        visible = (slots[None, :] <= slots[:, None])[None, None, None]  # [1, 1, 1, T, S]
    else:
        visible = (slots[None, None, :] <= query_positions[:, :, None])[:, None, None]  # [B, 1, 1, T, S]
    scores = jnp.where(visible, scores, -jnp.inf)
    if prefix is not None:
        seen = jnp.einsum("btkgh,pkh->bkgtp", q, prefix[0], preferred_element_type=jnp.float32) / math.sqrt(h)
        scores = jnp.concatenate([seen, scores], axis=-1)  # [B, K, N/K, T, P + S]
        value = jnp.concatenate([jnp.broadcast_to(prefix[1][None], (b, *prefix[1].shape)), value], axis=1)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, value)
    return out.reshape(b, t, n, h)
