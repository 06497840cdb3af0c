"""Bottleneck adapters (Houlsby et al., ICML 2019): out + up(gelu(down(out))) after the attention and the MLP."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fmfl_jax.models.llama import Llama
from fmfl_jax.peft.params import TrainableParam


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """bottleneck_dim: width R of the adapters."""

    bottleneck_dim: int = 16

    def __post_init__(self):
        if self.bottleneck_dim < 1:
            raise ValueError(f"adapter bottleneck_dim must be at least 1, got {self.bottleneck_dim}")


class AdapterParam(TrainableParam):
    """A matrix or bias of an adapter."""


class CastAdapter(NamedTuple):
    """The parameters of an Adapter in x's dtype."""

    down: jax.Array
    down_bias: jax.Array
    up: jax.Array
    up_bias: jax.Array

    def __call__(self, x):
        """x [..., D] -> [..., D]."""
        down_bias = jnp.broadcast_to(self.down_bias, (*x.shape[:-1], self.down_bias.shape[0]))
        inner = jax.nn.gelu(x @ self.down + down_bias)
        return x + inner @ self.up + jnp.broadcast_to(self.up_bias, x.shape)


class Adapter(nnx.Module):
    """down [D, R], down_bias [R], up [R, D] (zero: the identity at the start), up_bias [D]."""

    def __init__(self, embed_dim: int, bottleneck_dim: int, key):
        down = jax.random.normal(key, (embed_dim, bottleneck_dim), jnp.float32) / math.sqrt(embed_dim)
        self.down = AdapterParam(down)
        self.down_bias = AdapterParam(jnp.zeros(bottleneck_dim, jnp.float32))
        self.up = AdapterParam(jnp.zeros((bottleneck_dim, embed_dim), jnp.float32))
        self.up_bias = AdapterParam(jnp.zeros(embed_dim, jnp.float32))

    def __call__(self, x):
        """x [..., D] -> [..., D]."""
        return self.prepared(x.dtype)(x)

    def prepared(self, dtype):
        """The same with parameters that are cast once."""
        return CastAdapter(*(p.get_value().astype(dtype) for p in (self.down, self.down_bias, self.up, self.up_bias)))


def add_adapters(model: Llama, config: AdapterConfig, key) -> None:
    """Fills both adapter slots of every block."""
    for i, block in enumerate(model.layers):
        attn_key, mlp_key = jax.random.split(jax.random.fold_in(key, i))
        block.attn_adapter = Adapter(model.config.embed_dim, config.bottleneck_dim, attn_key)
        block.mlp_adapter = Adapter(model.config.embed_dim, config.bottleneck_dim, mlp_key)
