"""The keys and values of the tokens that a model has read, of all its layers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class KVCache(NamedTuple):
    """Keys and values of all layers, [B, K, S, H] each, or in one array [B, L, K, S, H]; slot s holds position s.

    One array is for a loop over layers (`Llama.has_loop`). The heads lie before the slots, so that attention's products
    are batched over the leading axes and read the cache as it lies: with [B, S, K, H] XLA turns all keys at every step.
    """

    keys: tuple[jax.Array, ...] | jax.Array
    values: tuple[jax.Array, ...] | jax.Array

    @property
    def is_one_array(self) -> bool:
        """Whether all layers' are in one."""
        return not isinstance(self.keys, tuple)


def of_layer(cache, layer):
    """[B, K, S, H] of a cache [B, L, K, S, H], layer int32 []; with None the cache itself, which is the layer's."""
    return cache if layer is None else jax.lax.dynamic_index_in_dim(cache, layer, axis=1, keepdims=False)


def write(cache, new, positions, layer):
    """cache [B, K, S, H] with new [B, T, K, H] written to slots positions [B, T]; beyond the last slot nothing is.
    With a layer, int32 [], it is the cache of all layers, [B, L, K, S, H].

    All three leading axes are indexed, which keeps the scatter's operand as it lies and in its place. With a batch of
    one dynamic_update_slice looks simpler, but XLA merges it into what reads the cache and then copies the cache.
    """
    rows, heads = (jnp.arange(n, dtype=jnp.int32) for n in (cache.shape[0], cache.shape[-3]))
    places = rows[:, None, None], heads[None, :, None], positions[:, None, :]  # [B, K, T] together
    if layer is not None:
        places = places[0], layer, *places[1:]
    return cache.at[places].set(new.astype(cache.dtype).transpose(0, 2, 1, 3), mode="drop", unique_indices=True)


def write_prefix(cache, prefix):
    """cache [B, .., K, S, H] with prefix [.., P, K, H] in slots 0 .. P-1 of every row."""
    prefix = jnp.swapaxes(prefix, -3, -2)  # [.., K, P, H]
    return cache.at[..., : prefix.shape[-2], :].set(prefix[None])
