"""Matrix products over a weight that is an array, an Int4Weight or an Int8Weight."""

import jax.numpy as jnp

from fmfl_jax.quant.int4 import Int4Weight
from fmfl_jax.quant.int8 import Int8Weight
from kernels.w4a16 import api
from kernels.w4a16.reference import swiglu


def matmul(x, weight):
    """x [..., K] @ weight [K, N] -> [..., N] in x's dtype.

    An array weight is cast to x's dtype. An Int4Weight takes the W4A16 kernel where there is one for it, and is not
    differentiated. Under vmap over x alone the batch folds into the rows: one product for all clients.
    """
    if isinstance(weight, Int8Weight):
        return matmul(jnp.concatenate([x, x], axis=-1), weight.halves)
    if isinstance(weight, Int4Weight):
        return api.matmul(x, *_packed(weight), **_static(weight))
    return x @ weight.astype(x.dtype)


def matmul_swiglu(x, weight):
    """x [..., K], weight [K, 2 F] (gate, then up) -> silu(x gate) * (x up) [..., F] in x's dtype.

    An Int4Weight takes the kernel with the activation in it where the rows are few. Its backward pass makes the product
    again, so it is for decoding.
    """
    if isinstance(weight, Int4Weight):
        return api.matmul_swiglu(x, *_packed(weight), **_static(weight))
    return swiglu(matmul(x, weight))


def look_up(embedding, tokens):
    """Rows of an embedding [V, D] for int32 tokens [...], [..., D]. An Int8Weight is a head [D, V], whose columns they
    are."""
    if isinstance(embedding, Int8Weight):
        return embedding.columns(tokens)
    return jnp.take(embedding, tokens, axis=0)


def _packed(weight: Int4Weight):
    return weight.qweight, weight.scale, weight.zero_point


def _static(weight: Int4Weight) -> dict[str, int]:
    k, n = weight.shape
    return {"k": k, "n": n, "group_size": weight.group_size, "activation_bits": weight.activation_bits}
