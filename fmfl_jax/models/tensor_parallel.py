"""Tensor parallelism (Shoeybi et al., 2019): a LLaMA's heads and hidden units cut over the mesh axis "model".

Each of n devices holds N/n heads with their rows of o_proj, F/n hidden units with their rows of down_proj, and the
embedding and head of V/n tokens (of all where n does not divide V). That is a smaller LLaMA (`cut_config`) whose two
sublayers end in a sum over the axis: two all-reduces of [.., D] a layer, whose time `services.tensor_parallel` reckons.
Cut along N (qkv, gate and up) a packed matrix keeps its groups; along K (o, down) groups that straddle a cut become
smaller ones of equal values.

Where there are fewer kv heads than devices, each is held by several. Cut parameters are stacked on a new first axis
and placed by `CUT_FROZEN`:

    {"cut": {name: [n, ...]}, "whole": {name: array}}
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fmfl_jax.config import LlamaConfig
from fmfl_jax.parallel import MODEL_AXIS
from fmfl_jax.quant.int4 import Int4Weight
from fmfl_jax.quant.int8 import Int8Weight
from fmfl_jax.quant.linear import look_up
from kernels.w4a16 import layout

CUT_FROZEN = {"cut": PartitionSpec(MODEL_AXIS), "whole": PartitionSpec()}  # where the two kinds lie
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
_BY_COLUMNS, _BY_ROWS = ("qkv_proj.weight", "gate_up_proj.weight"), ("o_proj.weight", "down_proj.weight")


def cut_config(config: LlamaConfig, parts: int) -> LlamaConfig:
    """The LLaMA that one of `parts` devices computes.

    Raises ValueError where parts does not divide heads and hidden units, or does not fit the kv heads (it divides them,
    or they divide it).
    """
    heads, kv, hidden = config.num_heads, config.num_kv_heads, config.hidden_dim
    if parts < 1 or heads % parts or hidden % parts or (kv % parts and parts % kv):
        raise ValueError(
            f"model_parallel={parts} does not divide {heads} heads, {kv} kv heads (or is no multiple of them) and "
            f"{hidden} hidden units"
        )
    return dataclasses.replace(
        config, num_heads=heads // parts, num_kv_heads=max(kv // parts, 1), hidden_dim=hidden // parts
    )


def part_columns(config: LlamaConfig, parts: int) -> dict[str, np.ndarray]:
    """int64 [parts, n]: of each projection that is cut along its outputs, the columns of every device."""
    local, h = cut_config(config, parts), config.head_dim
    columns = lambda heads: (heads[..., None] * h + np.arange(h)).reshape(parts, -1)
    heads, kv = np.arange(config.num_heads).reshape(parts, local.num_heads), columns(kv_heads_of(config, parts))
    hidden = np.arange(config.hidden_dim).reshape(parts, local.hidden_dim)
    return {"q_proj": columns(heads), "k_proj": kv, "v_proj": kv, "gate_proj": hidden, "up_proj": hidden}


def kv_heads_of(config: LlamaConfig, parts: int) -> np.ndarray:
    """int64 [parts, K/n, or 1]: the kv heads of every device."""
    return np.arange(parts)[:, None] * config.num_kv_heads // parts + np.arange(cut_config(config, parts).num_kv_heads)


def cut_params(config: LlamaConfig, params: dict, mesh: Mesh) -> dict:
    """The base parameters as `CUT_FROZEN` has them, on the devices of the mesh. Raises as `cut_config`."""
    parts, cut = mesh.shape[MODEL_AXIS], {}
    columns = part_columns(config, parts)
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    beside = {
        "qkv_proj.weight": (columns["q_proj"], q + columns["k_proj"], q + kv + columns["v_proj"]),
        "gate_up_proj.weight": (columns["gate_proj"], config.hidden_dim + columns["up_proj"]),
    }
    sharding = {kind: NamedSharding(mesh, spec) for kind, spec in CUT_FROZEN.items()}
    for name, weight in params.items():
        weight = jax.tree.map(np.asarray, weight)  # on the host: each device gets its part alone
        if name.endswith(_BY_COLUMNS):
            places = beside[next(end for end in _BY_COLUMNS if name.endswith(end))]
            cut[name] = _cut_columns(weight, np.concatenate(places, axis=1))
        elif name.endswith(_BY_ROWS):
            cut[name] = _cut_rows(weight, parts)
        elif name in VOCABULARY and config.vocab_size % parts == 0:
            cut[name] = _cut_vocabulary(name, weight, parts)
    whole = {name: weight for name, weight in params.items() if name not in cut}
    return {"cut": jax.device_put(cut, sharding["cut"]), "whole": jax.device_put(whole, sharding["whole"])}


def look_up_cut(embedding, tokens):
    """`quant.linear.look_up`, inside of shard_map, in the part of an embedding that this device has; the sum over the
    axis brings each token's row from where it is."""
    size = embedding.shape[1] if isinstance(embedding, Int8Weight) else embedding.shape[0]
    own = tokens - size * jax.lax.axis_index(MODEL_AXIS)
    rows = look_up(embedding, jnp.clip(own, 0, size - 1))
    here = (own >= 0) & (own < size)
    return jax.lax.psum(jnp.where(here[..., None], rows, jnp.zeros_like(rows)), MODEL_AXIS)


def own_params(frozen: dict) -> dict:
    """Inside of shard_map: this device's parameters, by name."""
    return jax.tree.map(lambda x: x[0], frozen["cut"]) | frozen["whole"]


def _cut_columns(weight, columns: np.ndarray) -> Any:
    """weight [K, N], columns [parts, n] -> [parts, K, n]."""
    if not isinstance(weight, Int4Weight):
        return np.stack([weight[:, own] for own in columns])
    q, scale, zero_point = weight.unpack()
    pieces = [
        Int4Weight.pack(q[:, own], scale[:, own], zero_point[:, own], group_size=weight.group_size) for own in columns
    ]
    stacked = jax.tree.map(lambda *x: np.stack(x), *pieces)
    return dataclasses.replace(stacked, activation_bits=weight.activation_bits)


def _cut_vocabulary(name: str, weight, parts: int):
    """An embedding [V, D] -> [parts, V / parts, D]; a head [D, V] (or the tied one in its place) -> [parts, D, ..]."""
    if name == VOCABULARY[0] and not isinstance(weight, Int8Weight):
        return weight.reshape(parts, -1, weight.shape[1])
    columns = np.arange(weight.shape[1]).reshape(parts, -1)
    if isinstance(weight, Int8Weight):
        return dataclasses.replace(weight, halves=_cut_columns(weight.halves, columns))
    return _cut_columns(weight, columns)


def _cut_rows(weight, parts: int):
    """weight [K, N] -> [parts, K / parts, N]."""
    k, n = weight.shape
    if not isinstance(weight, Int4Weight):
        return weight.reshape(parts, k // parts, n)
    packed = (weight.qweight, weight.scale, weight.zero_point)
    arrays, size = layout.shard_k(*packed, k=k, n=n, group_size=weight.group_size, parts=parts)
    qweight, scale, zero_point = arrays
    return Int4Weight(qweight, scale, zero_point, (k // parts, n), size, weight.activation_bits)
