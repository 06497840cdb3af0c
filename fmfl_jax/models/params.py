"""Parameters as flat dictionaries {"layers.0.self_attn.qkv_proj.weight": array}, apart from any class.

Everything outside models/ and peft/ sees these dictionaries: they are pytrees, and what is saved or sent depends on
no class. NNX appears at this one boundary (and in peft/split.py).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fmfl_jax.config import LlamaConfig
from fmfl_jax.models.llama import abstract_llama
from fmfl_jax.quant.int4 import Int4Weight


def to_dict(state: nnx.State) -> dict:
    """{dotted name: value} of an NNX state."""
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def from_dict(state: nnx.State, params: dict) -> nnx.State:
    """`state` with its values replaced by those of params; raises KeyError for a missing name."""
    return nnx.from_flat_state(
        {path: variable.replace(params[".".join(map(str, path))]) for path, variable in nnx.to_flat_state(state)}
    )


class Projection(NamedTuple):
    """Where one published projection (q_proj) lives: columns [start, start + out_dim) of the matrix `matrix`.weight."""

    matrix: str
    start: int
    in_dim: int
    out_dim: int

    @property
    def columns(self) -> slice:
        """Its columns of the matrix."""
        return slice(self.start, self.start + self.out_dim)


def projections(config: LlamaConfig) -> dict[str, Projection]:
    """{published name ("layers.0.self_attn.q_proj"): Projection} of the blocks' projections, in the order of use."""
    d, f = config.embed_dim, config.hidden_dim
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    found = {}
    for i in range(config.num_layers):
        attn, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
        found |= {
            f"{attn}.q_proj": Projection(f"{attn}.qkv_proj", 0, d, q),
            f"{attn}.k_proj": Projection(f"{attn}.qkv_proj", q, d, kv),
            f"{attn}.v_proj": Projection(f"{attn}.qkv_proj", q + kv, d, kv),
            f"{attn}.o_proj": Projection(f"{attn}.o_proj", 0, q, d),
            f"{mlp}.gate_proj": Projection(f"{mlp}.gate_up_proj", 0, d, f),
            f"{mlp}.up_proj": Projection(f"{mlp}.gate_up_proj", f, d, f),
            f"{mlp}.down_proj": Projection(f"{mlp}.down_proj", 0, f, d),
        }
    return found


def param_specs(config: LlamaConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Name -> shape of every parameter of a base model."""
    return to_dict(nnx.split(abstract_llama(config))[1])


def init_params(config: LlamaConfig, key, *, dtype="float32") -> dict[str, jax.Array]:
    """Fresh parameters, one tensor at a time: normal(0.02), output projections divided by sqrt(2 num_layers), norms 1.

    dtype is the stored dtype of the matrices; norms are float32.
    """
    specs = sorted(param_specs(config).items())
    return {
        name: init_tensor(config, name, spec.shape, jax.random.fold_in(key, i), dtype=dtype)
        for i, (name, spec) in enumerate(specs)
    }


def init_tensor(config: LlamaConfig, name: str, shape: tuple[int, ...], key, *, dtype) -> jax.Array:
    """One parameter of `init_params`."""
    if len(shape) == 1:
        return jnp.ones(shape, jnp.float32)
    return _normal(key, shape, init_stddev(config, name), dtype)


def init_stddev(config: LlamaConfig, name: str) -> float:
    """The standard deviation that the matrix `name` starts with."""
    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    return 0.02 / math.sqrt(2 * config.num_layers) if residual else 0.02


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key, shape, stddev, dtype):
    return (stddev * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def is_weight(x) -> bool:
    """True for an Int4Weight: use as is_leaf to keep it whole in a tree map."""
    return isinstance(x, Int4Weight)


def num_params(config: LlamaConfig) -> int:
    """Of the base model, whatever its weights are packed in."""
    return sum(math.prod(spec.shape) for spec in param_specs(config).values())


def num_bytes(params: dict) -> int:
    """Bytes that the parameters hold, packed weights counted as packed."""
    return sum(x.nbytes for x in jax.tree.leaves(params, is_leaf=is_weight))
