"""DP-SGD (Abadi et al., CCS 2016): a private gradient of one step at a client.

    g = 1 / m (sum_i clip(grad l(params, x_i), C) + N(0, (z C)^2 I))

The unit of privacy is one example. Every example of a client joins a step with probability q, independently
(data/batches.py:poisson_client_batches); m = q n, the expected batch, is fixed. The batch has a static size: a mask
says which of its rows were drawn. What a client sends after a round has cost `local_steps` releases.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fmfl_jax.fed.core.types import Array, GradFn, LossFn, Tree
from fmfl_jax.fed.privacy.clipping import add_noise, clip_by_norm

_NOISE = 2**31 - 1  # folded into keys; the examples' numbers stay below


class MaskedBatch(NamedTuple):
    """examples: pytree of [B, ...]. mask: bool [B], which of them there are."""

    examples: Tree
    mask: Array


def private_grad(
    loss_fn: LossFn,
    params,
    frozen,
    batch,
    mask,
    key,
    *,
    clip_norm: float,
    noise_multiplier: float,
    expected_batch_size: float,
    microbatch: int | None = None,
):
    """(loss, grad), in the order of jax.value_and_grad.

    loss_fn(params, frozen, batch, key) -> mean loss over a batch's leading axis; it is given one example at a time,
      with an axis of length 1. batch: pytree of [B, ...]. mask: bool [B].
    microbatch: so many examples' gradients are held at once; None for all. Any number does: the last is filled up.

    grad: like params. loss: float32, the mean over the examples there are (0 without any); exact, hence not private.
    What stands in masked rows changes nothing, not even if it is NaN. An example whose gradient is not finite counts as
    masked: the others still get a gradient, and its influence stays bounded.

    Raises ValueError for numbers out of range. clip_norm may be infinite where there is no noise.
    """
    _check(clip_norm, noise_multiplier, expected_batch_size, microbatch)
    size = mask.shape[0]
    chunk = size if microbatch is None else min(microbatch, size)

    def one(example, present, number):
        alone = jax.tree.map(lambda x: x[None], example)
        loss, grad = jax.value_and_grad(loss_fn)(params, frozen, alone, jax.random.fold_in(key, number))
        grad, norm = clip_by_norm(grad, jnp.float32(clip_norm))
        present &= jnp.isfinite(norm)
        keep = lambda x: jnp.where(present, x, jnp.zeros_like(x))
        return jax.tree.map(keep, (grad, loss.astype(jnp.float32), jnp.float32(1.0)))

    def summed(rows):
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.vmap(one)(*rows))

    rows = (batch, mask, jnp.arange(size, dtype=jnp.int32))
    if chunk == size:
        grad, loss, count = summed(rows)
    else:
        num_chunks = -(-size // chunk)
        fill = num_chunks * chunk - size
        rows = jax.tree.map(
            lambda x: jnp.concatenate([x, jnp.zeros((fill, *x.shape[1:]), x.dtype)]).reshape(
                num_chunks, chunk, *x.shape[1:]
            ),
            rows,
        )
        start = (optax.tree.zeros_like(params), jnp.float32(0.0), jnp.float32(0.0))
        total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, summed(part)), None), start, rows)
        grad, loss, count = total
    if noise_multiplier:
        grad = add_noise(grad, jnp.float32(noise_multiplier * clip_norm), jax.random.fold_in(key, _NOISE))
    return loss / jnp.maximum(count, 1.0), jax.tree.map(lambda x: x / jnp.asarray(expected_batch_size, x.dtype), grad)


def private_grad_fn(
    loss_fn: LossFn,
    *,
    clip_norm: float,
    noise_multiplier: float,
    expected_batch_size: float,
    microbatch: int | None = None,
) -> GradFn:
    """grad_fn(params, frozen, MaskedBatch, key) -> (loss, grad): `private_grad` as the algorithms take it."""
    _check(clip_norm, noise_multiplier, expected_batch_size, microbatch)

    def grad_fn(params, frozen, batch: MaskedBatch, key):
        return private_grad(
            loss_fn,
            params,
            frozen,
            batch.examples,
            batch.mask,
            key,
            clip_norm=clip_norm,
            noise_multiplier=noise_multiplier,
            expected_batch_size=expected_batch_size,
            microbatch=microbatch,
        )

    return grad_fn


def _check(clip_norm, noise_multiplier, expected_batch_size, microbatch):
    if not clip_norm > 0:
        raise ValueError(f"clip_norm is {clip_norm}: expected a positive number")
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier is {noise_multiplier}: expected at least 0")
    if noise_multiplier and math.isinf(clip_norm):
        raise ValueError("without clipping no noise is enough: clip_norm must be finite unless noise_multiplier is 0")
    if not 0 < expected_batch_size < math.inf:
        raise ValueError(f"expected_batch_size is {expected_batch_size}: expected a positive number")
    if microbatch is not None and microbatch < 1:
        raise ValueError(f"microbatch is {microbatch}: expected at least 1")
