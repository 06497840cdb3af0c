"""LoRA (Hu et al., ICLR 2022): y = x W + (alpha / rank) (x A) B, A [D, R] and B [R, F] trained, B zero at the start."""

import dataclasses
import fnmatch
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fmfl_jax.config import LlamaConfig
from fmfl_jax.finite import finite_fields
from fmfl_jax.models.llama import Llama
from fmfl_jax.models.params import projections
from fmfl_jax.peft.params import TrainableParam
from fmfl_jax.quant.int4 import Int4Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class LoraConfig:
    """targets: names of projections ("q_proj") or patterns over their full names ("layers.[01].self_attn.*_proj")."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"LoRA rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout must be in [0, 1), got {self.dropout}")
        if not self.targets:
            raise ValueError("LoRA needs at least one target projection")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


class LoraParam(TrainableParam):
    """lora_a [D, R] or lora_b [R, F]."""


class LoraFactors(nnx.Module):
    """lora_a [in_dim, R], uniform in +-1/sqrt(in_dim) as in the paper's code, and lora_b [R, out_dim], zero."""

    def __init__(self, in_dim: int, out_dim: int, rank: int, key):
        bound = 1 / math.sqrt(in_dim)
        self.lora_a = LoraParam(jax.random.uniform(key, (in_dim, rank), jnp.float32, -bound, bound))
        self.lora_b = LoraParam(jnp.zeros((rank, out_dim), jnp.float32))


class JoinedFactors(NamedTuple):
    """a [D, sum of R] and b [sum of R, sum of F], in x's dtype: x -> (x a) b."""

    a: jax.Array
    b: jax.Array

    def __call__(self, x, dropout_key):
        """x [..., D] -> [..., sum of F]; without dropout whatever the key."""
        rows = x.reshape(-1, x.shape[-1])  # over two dimensions XLA's CPU backend would turn x for the gradients
        return ((rows @ self.a) @ self.b).reshape(*x.shape[:-1], -1)


class Lora(nnx.Module):
    """The low-rank terms of one Linear, of which some parts (q_proj, v_proj) have factors and others none.

    The A's stand side by side and the B's in blocks, so that all parts take two products and no slicing:
    (x [A_q A_v]) [[B_q, 0, 0], [0, 0, B_v]]. Dropout draws one mask on x for all parts; `index` tells the Linears of a
    model apart, so that each draws its own.
    """

    def __init__(self, linear, targets: list[str], config: LoraConfig, index: int, key):
        self.parts, self.scale, self.dropout, self.index = linear.parts, config.scale, config.dropout, index
        for i, (part, out_dim) in enumerate(linear.parts):
            if part in targets:
                setattr(self, part, LoraFactors(linear.in_dim, out_dim, config.rank, jax.random.fold_in(key, i)))

    def __call__(self, x, dropout_key):
        """x [..., D] -> [..., sum of F]; dropout_key None is evaluation: no dropout."""
        if self.dropout and dropout_key is not None:
            keep = jax.random.bernoulli(jax.random.fold_in(dropout_key, self.index), 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), jnp.zeros_like(x))
        return self.prepared(x.dtype)(x, None)

    def prepared(self, dtype):
        """The same without dropout, from factors that are joined and cast once."""
        return JoinedFactors(*(factor.astype(dtype) for factor in self._joined()))

    def _joined(self):
        """A [D, sum of R] and the block matrix of scale * B [sum of R, sum of F]."""
        targets = [part for part, _ in self.parts if hasattr(self, part)]
        a = jnp.concatenate([getattr(self, part).lora_a.get_value() for part in targets], axis=1)
        rows = []
        for target in targets:
            lora_b = self.scale * getattr(self, target).lora_b.get_value()
            rows.append(
                jnp.concatenate(
                    [
                        lora_b if part == target else jnp.zeros((lora_b.shape[0], dim), lora_b.dtype)
                        for part, dim in self.parts
                    ],
                    axis=1,
                )
            )
        return a, jnp.concatenate(rows, axis=0)


def lora_targets(config: LlamaConfig, targets: tuple[str, ...]) -> list[str]:
    """Published names of the projections that `targets` name; ValueError for a target that matches none."""
    candidates, chosen = projections(config), set()
    for target in targets:
        names = [name for name in candidates if fnmatch.fnmatchcase(name, target) or name.endswith("." + target)]
        if not names:
            raise ValueError(
                f"LoRA target {target!r} matches no projection: expected one of "
                f"{sorted({name.rpartition('.')[2] for name in candidates})} or a pattern over names "
                f"like {next(iter(candidates))!r}"
            )
        chosen.update(names)
    return [name for name in candidates if name in chosen]


def add_lora(model: Llama, config: LoraConfig, key) -> None:
    """Fills the `lora` slot of every Linear that a target names."""
    parts = {}
    for name in lora_targets(model.config, config.targets):
        parts.setdefault(projections(model.config)[name].matrix, []).append(name.rpartition(".")[2])
    for i, (matrix, names) in enumerate(parts.items()):
        linear: Any = model
        for part in matrix.split("."):
            linear = _child(linear, part)
        linear.lora = Lora(linear, names, config, i, jax.random.fold_in(key, i))


def merge_lora(params: dict, trainable: dict, model_config: LlamaConfig, config: LoraConfig) -> dict:
    """Base parameters with W + scale A B in place of W, in W's dtype.

    Raises ValueError for a packed base: its 4 bits cannot hold the sum.
    """
    merged = dict(params)
    for name, (matrix, start, _, out_dim) in projections(model_config).items():
        factors = f"{matrix}.lora.{name.rpartition('.')[2]}"
        if f"{factors}.lora_a" not in trainable:
            continue
        weight = merged[f"{matrix}.weight"]
        if isinstance(weight, Int4Weight):
            raise ValueError(f"{matrix}.weight is quantized: LoRA cannot be merged into it")
        delta = config.scale * trainable[f"{factors}.lora_a"] @ trainable[f"{factors}.lora_b"]  # [D, F]
        merged[f"{matrix}.weight"] = weight.at[:, start : start + out_dim].add(delta.astype(weight.dtype))
    return merged


def _child(module, name: str):
    return module[int(name)] if name.isdigit() else getattr(module, name)
