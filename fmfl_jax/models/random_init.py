"""Random models in the format they are computed with, for measurements at sizes of which no checkpoint is at hand."""

import functools
import math

import jax
import jax.numpy as jnp

from fmfl_jax.config import LlamaConfig
from fmfl_jax.models.params import init_stddev, init_tensor, param_specs
from fmfl_jax.quant.int4 import Int4Weight
from fmfl_jax.quant.rtn import SCALE_DTYPE

_NIBBLE_STDDEV = math.sqrt((16**2 - 1) / 12)  # of a uniform integer 0 .. 15


def random_int4_params(config: LlamaConfig, key, *, group_size: int, head: bool) -> dict:
    """Parameters as `params.init_params` gives them, with the blocks' matrices packed from random bits.

    No matrix is ever held unpacked but the one that is being made, in 8 bits; what they stand for has the standard
    deviations of `init_params`. Embedding and head are in config.dtype, norms float32.

    Args:
      group_size: rows of the input dimension per scale.
      head: whether the head is packed too.

    Raises:
      ValueError: head of a model whose head is its embedding.
    """
    if head and config.tie_embeddings:
        raise ValueError("the head of this model is its embedding, which is looked up in and cannot be packed")
    params = {}
    for i, (name, spec) in enumerate(sorted(param_specs(config).items())):
        packed = len(spec.shape) == 2 and (name.startswith("layers.") or (head and name == "lm_head.weight"))
        tensor_key = jax.random.fold_in(key, i)
        if packed:
            params[name] = _random_packed(tensor_key, spec.shape, init_stddev(config, name), group_size)
        else:
            params[name] = init_tensor(config, name, spec.shape, tensor_key, dtype=config.dtype)
    return params


@functools.partial(jax.jit, static_argnames=("shape", "group_size"))
def _random_packed(key, shape, stddev, group_size):
    """Uniform integers with zero points 7 or 8, so that the mean is nearly 0; scales within half of each other."""
    groups = -(-shape[0] // group_size)
    keys = jax.random.split(key, 3)
    q = jax.random.bits(keys[0], shape, jnp.uint8) & jnp.uint8(15)
    zero_point = jnp.uint8(7) + (jax.random.bits(keys[1], (groups, shape[1]), jnp.uint8) & jnp.uint8(1))
    scale = jax.random.uniform(keys[2], (groups, shape[1]), jnp.float32, 0.75, 1.25) * (stddev / _NIBBLE_STDDEV)
    return Int4Weight.pack(q, scale.astype(SCALE_DTYPE), zero_point, group_size=group_size)
