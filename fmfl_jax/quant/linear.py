"""Matrix products over a weight that is an array, an Int4Weight or an Int8Weight."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fmfl_jax.quant.int4 import Int4Layers, Int4Weight
from fmfl_jax.quant.int8 import Int8Weight
from kernels.decode import api as decode
from kernels.float32 import product as float32
from kernels.w4a16 import api, halves
from kernels.w4a16.reference import swiglu


def matmul(x, weight):
    """x [..., K] @ weight [K, N] -> [..., N] in x's dtype.

    An array weight is cast to x's dtype. An Int4Weight takes the W4A16 kernel where there is one for it, and is not
    differentiated. Under vmap over x alone the batch folds into the rows: one product for all clients.
    """
    if isinstance(weight, Int8Weight):
        k, n = weight.shape
        return halves.matmul(x, *_packed(weight.halves), **_static(weight.halves) | {"k": k, "n": n})
    if isinstance(weight, Int4Layers):
        packed = [_packed(w) for w in weight.weights]
        return api.matmul_layer(x, weight.layer, packed, **_static(weight.weights[0]))
    if isinstance(weight, Int4Weight):
        return api.matmul(x, *_packed(weight), **_static(weight))
    return product(x, weight.astype(x.dtype))


def product(x, weight) -> jax.Array:
    """x [..., K] @ weight [K, N], arrays of one dtype; float32 goes to a CPU's matrix unit where there is one
    (`kernels.float32`)."""
    return float32.matmul(x, weight) if float32.serves(x, weight) else x @ weight


def turned_product(x, weight) -> jax.Array:
    """float32 [..., N]: as `product`, with weight [N, K]."""
    if float32.serves(x, weight):
        return float32.matmul(x, weight, turned=True)
    return jnp.einsum("...k,nk->...n", x, weight, preferred_element_type=jnp.float32)


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


def decodes_fused(*weights) -> bool:
    """Whether a decode step over these weights has kernels here (CUDA, 4 bits)."""
    return api.can_launch() and all(isinstance(w, Int4Weight) for w in weights)


def decodes_looped(*weights) -> bool:
    """Whether a loop over layers reads such weights of a layer without a copy (on a CPU, 4 bits)."""
    return api.runs_layers() and all(isinstance(w, Int4Weight) for w in weights)


def matmul_norm(x, weight, residual, norm_weight, eps: float, norm: Callable, zeros=None, **of_zeros: int):
    """h = residual + x @ weight and norm(h, norm_weight), an RMSNorm with this eps; x [M, K], residual [M, N].

    The weight is an Int4Weight; zeros, first_zero, num_zeros and what is returned: `kernels.decode.api.matmul_norm`.
    """

    def otherwise(x, residual, norm_weight, *packed):
        h = residual + api.matmul(x, *packed, **_static(weight))
        return h, norm(h, norm_weight)

    arrays = (x, residual, norm_weight, zeros, *_packed(weight))
    return decode.matmul_norm(otherwise, *arrays, eps=eps, **of_zeros, **_shape(weight))


def add_norm(x, residual, norm_weight, eps: float, norm: Callable, num_zeros: int):
    """h = residual + x and norm(h, norm_weight), as of `matmul_norm`; x and residual [M, N]."""

    def otherwise(x, residual, norm_weight):
        h = residual + x
        return h, norm(h, norm_weight)

    return decode.add_norm(otherwise, x, residual, norm_weight, eps=eps, num_zeros=num_zeros)


def matmul_attend(x, weight, delta, cos, sin, keys, values, positions, eps: float, attend: Callable):
    """attend(x @ weight + delta, cos, sin, keys, values, positions) of one token a row, and zeros for `matmul_norm`.

    x is as `matmul_norm` returns a norm with this eps, delta None for none, the weight an Int4Weight:
    `kernels.decode.api.matmul_attend`.
    """

    def otherwise(x, delta, cos, sin, keys, values, positions, *packed):
        qkv = api.matmul(x, *packed, **_static(weight))
        return attend(qkv if delta is None else qkv + delta, cos, sin, keys, values, positions)

    arrays = (x, delta, cos, sin, keys, values, positions, *_packed(weight))
    return decode.matmul_attend(otherwise, *arrays, eps=eps, **_shape(weight))


def swiglu_zeros(rows: int, weight) -> int:
    """How many zeros `matmul_swiglu_step` of so many rows takes from `matmul_norm`."""
    return decode.swiglu_zeros(rows, weight.shape[1])


def matmul_swiglu_step(x, weight, eps: float, zeros):
    """`matmul_swiglu` of x as `matmul_norm` returns a norm with this eps, and zeros for `matmul_norm` or None."""
    otherwise = lambda x, *packed: api.matmul_swiglu(x, *packed, **_static(weight))
    return decode.matmul_swiglu(otherwise, x, zeros, *_packed(weight), eps=eps, **_shape(weight))


def _packed(weight: Int4Weight):
    return weight.qweight, weight.scale, weight.zero_point


def _static(weight: Int4Weight) -> dict[str, int]:
    return _shape(weight) | {"activation_bits": weight.activation_bits}


def _shape(weight: Int4Weight) -> dict[str, int]:
    k, n = weight.shape
    return {"k": k, "n": n, "group_size": weight.group_size}
