"""Scaled dot-product attention with grouped queries, causal, softmax in float32.

The queries of a group stand below each other, so that the products have T N/K rows and keys are never repeated. Keys
and values are turned to [B, K, H, S] once: XLA's CPU backend multiplies with S in the lines in both directions, where
the layout it chooses itself, [.., S, H], costs copies and a product three times as slow in the backward pass.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def attend(q, key, value, *, prefix=None):
    """q [B, T, N, H], key and value [B, T, K, H] -> [B, T, N, H]; N a multiple of K. Query t sees keys 0 .. t.

    `prefix` is None or (keys, values), [P, K, H] each, seen by every query. Differentiable in reverse mode only.
    """
    b, t = q.shape[:2]
    visible = _causal(t)
    if prefix is not None:
        key, value = (
            jnp.concatenate([jnp.broadcast_to(p[None], (b, *p.shape)), x], axis=1) for p, x in zip(prefix, (key, value))
        )  # [B, P + T, K, H]
        visible = jnp.concatenate([jnp.ones((t, prefix[0].shape[0]), bool), visible], axis=1)
    return _from_groups(_attend(*_in_groups(q, key, value), visible), q.shape)


def attend_received(q, key, value):
    """`attend`'s [B, T, N, H], and float32 [B, T] the attention that a token gets, summed over the queries of its
    sequence, the mean of the heads: 1 on average."""
    out, (*_, weights) = _attend_forward(*_in_groups(q, key, value), _causal(q.shape[1]))
    ones = jnp.ones(weights.shape[1:3], weights.dtype)  # a product: XLA's CPU backend is slow in sums over leading axes
    received = jnp.einsum("kr,bkrs->bs", ones, weights, preferred_element_type=jnp.float32) / q.shape[2]
    return _from_groups(out, q.shape), received


def _causal(t: int):
    """bool [T, S]: slots up to a query's own."""
    slots = jnp.arange(t, dtype=jnp.int32)
    return slots[None, :] <= slots[:, None]


def _in_groups(q, key, value):
    """q [B, T, N, H] scaled, [B, K, N/K T, H]; key and value [B, S, K, H] -> [B, K, H, S]."""
    b, t, n, h = q.shape
    k = key.shape[2]
    q = (q / math.sqrt(h)).reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4)  # [B, K, N/K, T, H]
    return q.reshape(b, k, -1, h), key.transpose(0, 2, 3, 1), value.transpose(0, 2, 3, 1)


def _from_groups(out, shape):
    """out [B, K, N/K T, H] -> [B, T, N, H], the shape given."""
    b, t, n, h = shape
    k = out.shape[1]
    return out.reshape(b, k, n // k, t, h).transpose(0, 3, 1, 2, 4).reshape(shape)


def attend_cached(q, key, value, query_positions):
    """q [B, T, N, H], key and value [B, K, S, H], the slots of a cache -> [B, T, N, H].

    Query t sees slots s <= query_positions[b, t], int32 [B, T]. The cache is read as it lies and in its own dtype: the
    products are batched over its leading axes, and what is turned is the query and the output. Without the constraint
    XLA's GPU backend turns the values of all layers before and after every loop of decoding.
    """
    b, t, n, h = q.shape
    k, num_slots = key.shape[1:3]
    q = q.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4).reshape(b, k, -1, h)  # [B, K, N/K T, H]
    scores = jnp.einsum("bkrh,bksh->bkrs", q, key, preferred_element_type=jnp.float32) / math.sqrt(h)
    visible = jnp.arange(num_slots, dtype=jnp.int32)[None, None] <= query_positions[:, :, None]  # [B, T, S]
    scores = jnp.where(visible[:, None, None], scores.reshape(b, k, n // k, t, num_slots), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype).reshape(b, k, -1, num_slots)
    value = with_layout_constraint(value, Layout((0, 1, 2, 3)))
    out = jnp.einsum("bkrs,bksh->bkrh", weights, value).reshape(b, k, n // k, t, h)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


@jax.custom_vjp
def _attend(q, key, value, visible):
    """q [B, K, G T, H], scaled; key and value [B, K, H, S]; visible bool [T, S] -> [B, K, G T, H]."""
    return _attend_forward(q, key, value, visible)[0]


def _attend_forward(q, key, value, visible):
    b, k, rows, _ = q.shape
    t, s = visible.shape
    scores = jnp.einsum("bkth,bkhs->bkts", q, key, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[None, None, None], scores.reshape(b, k, rows // t, t, s), -jnp.inf)
    scores = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))  # every query sees itself: the maximum is finite
    weights = scores / jnp.sum(scores, axis=-1, keepdims=True)
    weights = weights.reshape(b, k, rows, s).astype(value.dtype)
    return jnp.einsum("bkts,bkhs->bkth", weights, value), (q, key, value, weights)


def _attend_backward(residuals, d_out):
    q, key, value, weights = residuals
    d_value = jnp.einsum("bkts,bkth->bkhs", weights, d_out)
    d_weights = jnp.einsum("bkth,bkhs->bkts", d_out, value, preferred_element_type=jnp.float32)
    weights = weights.astype(jnp.float32)
    d_scores = weights * (d_weights - jnp.sum(weights * d_weights, axis=-1, keepdims=True))
    d_scores = d_scores.astype(q.dtype)
    d_q = jnp.einsum("bkts,bkhs->bkth", d_scores, key)
    d_key = jnp.einsum("bkts,bkth->bkhs", d_scores, q)
    return d_q, d_key, d_value, None


_attend.defvjp(_attend_forward, _attend_backward)
