"""Tuned parameters in the files of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors.

LoRA, prompt tuning and prefix tuning are written as peft itself writes them (LORA, PROMPT_TUNING, PREFIX_TUNING), so
that `peft.PeftModel.from_pretrained` loads them. Bottleneck adapters, which peft has not, are written to the same two
files under the peft_type BOTTLENECK_ADAPTER with our own names; peft refuses that type.
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.config import LlamaConfig
from fmfl_jax.models.formats.config_json import read_json
from fmfl_jax.models.formats.safetensors_io import TensorInfo, TensorSpec, map_tensor, read_header, write_tensors
from fmfl_jax.models.formats.staging import staged_directory, write_text
from fmfl_jax.models.params import projections
from fmfl_jax.peft.adapter import AdapterConfig
from fmfl_jax.peft.lora import LoraConfig, lora_targets
from fmfl_jax.peft.prompt import PrefixConfig, PromptConfig
from fmfl_jax.peft.split import PeftConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_LORA_TENSOR = re.compile(r"base_model\.model\.model\.(.+)\.lora_([AB])\.weight")
_PROMPT_TENSOR = "prompt_embeddings"
_COMMON_FIELDS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}
# Fields that do not change what a saved adapter computes, beside those that are read here: which modules were chosen
# (the tensors say), how they were initialized, and settings of options that are off.
_NEUTRAL_FIELDS = {
    "LORA": {
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "fan_in_fan_out",
        "init_lora_weights",
        "loftq_config",
        "eva_config",
        "megatron_core",
        "qalora_group_size",
        "use_rslora",
        "runtime_config",
    },
    "PROMPT_TUNING": {
        "num_virtual_tokens",
        "token_dim",
        "num_layers",
        "num_attention_heads",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_name_or_path",
        "tokenizer_kwargs",
    },
    # prefix_projection: peft saves the projected prefix, which is all that is needed.
    "PREFIX_TUNING": {
        "num_virtual_tokens",
        "token_dim",
        "num_layers",
        "num_attention_heads",
        "encoder_hidden_size",
        "prefix_projection",
        "init_weights",
    },
    "BOTTLENECK_ADAPTER": {"bottleneck_dim"},
}
_ALLOWED = {"bias": ("none",), "num_transformer_submodules": (1, None)}
# Other initializations (PiSSA, OLoRA, ...) change the base weights too.
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


def save_peft(
    path: str | os.PathLike,
    peft_config: PeftConfig,
    trainable: Mapping[str, Any],
    model_config: LlamaConfig,
    base_model_name: str | os.PathLike,
) -> None:
    """Writes the folder `path`; one that holds an earlier result is replaced.

    Args:
      trainable: {name: array}, as `fmfl_jax.peft.split.split` gives it.
      base_model_name: where the base model is found, for peft's base_model_name_or_path.

    Raises:
      ValueError: trainable is not what peft_config says, or peft_config is full fine-tuning (use save_checkpoint) or
        none.
      OSError: the disk is full, or the folder holds other files; nothing half-written is left.
    """
    shapes = trainable_shapes(peft_config, model_config)
    if set(trainable) != set(shapes):
        wrong = sorted(set(trainable) ^ set(shapes))[0]
        raise ValueError(f"cannot save: {wrong} is {'missing' if wrong in shapes else f'not of {peft_config}'}")
    for name, shape in shapes.items():
        if tuple(trainable[name].shape) != shape:
            raise ValueError(f"cannot save: {name} has shape {tuple(trainable[name].shape)}, expected {shape}")
    arrays = {name: np.asarray(value) for name, value in trainable.items()}
    fields, tensors = _encode(peft_config, arrays, model_config)
    raw = {"base_model_name_or_path": str(base_model_name), "task_type": "CAUSAL_LM", "inference_mode": True} | fields
    specs = [TensorSpec(name, value.dtype, value.shape) for name, value in tensors.items()]
    with staged_directory(path, owned=(CONFIG_FILE, WEIGHTS_FILE, "README.md")) as folder:
        write_tensors(folder / WEIGHTS_FILE, specs, tensors.values())
        write_text(folder / CONFIG_FILE, json.dumps(raw, indent=2, sort_keys=True) + "\n")


def load_peft(path: str | os.PathLike, model_config: LlamaConfig) -> tuple[PeftConfig, dict[str, jax.Array]]:
    """The configuration and {name: float32 array} of a folder that save_peft or peft wrote, for this base model.

    A LoRA's targets are those that have tensors; peft's rsLoRA scale is taken into alpha.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: an unknown peft_type, an option that is not implemented (DoRA, biases, rank patterns, ...), or tensors
        that do not fit the configuration or the model.
    """
    folder = pathlib.Path(path)
    file = folder / CONFIG_FILE
    raw = read_json(file)
    kind = raw.get("peft_type")
    if kind not in _NEUTRAL_FIELDS:
        raise ValueError(
            f"{file}: peft_type is {kind!r}: not implemented, expected one of {', '.join(map(repr, _NEUTRAL_FIELDS))}"
        )
    _check_fields(raw, kind, file)
    tensors = read_header(folder / WEIGHTS_FILE)
    for name, info in tensors.items():
        if info.dtype not in ("F32", "F16", "BF16"):
            raise ValueError(f"{info.path}: tensor {name} has dtype {info.dtype}: expected F32 or F16 or BF16")
    try:
        match kind:
            case "LORA":
                peft_config = _lora_config(raw, tensors, model_config, file)
            case "PROMPT_TUNING":
                peft_config = PromptConfig(num_tokens=_integer(raw, "num_virtual_tokens", file))
            case "PREFIX_TUNING":
                peft_config = PrefixConfig(num_tokens=_integer(raw, "num_virtual_tokens", file))
            case "BOTTLENECK_ADAPTER":
                peft_config = AdapterConfig(bottleneck_dim=_integer(raw, "bottleneck_dim", file))
    except ValueError as e:
        raise e if str(folder) in str(e) else ValueError(f"{file}: {e}") from e
    return peft_config, _decode(peft_config, tensors, model_config, folder / WEIGHTS_FILE)


def trainable_shapes(peft_config: PeftConfig, c: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the trainable parameters that `split` makes for peft_config.

    Raises ValueError for full fine-tuning and for none: neither has parameters of its own.
    """
    match peft_config:
        case LoraConfig(rank=r):
            shapes = {}
            for name in lora_targets(c, peft_config.targets):
                p, factors = projections(c)[name], _lora_name(c, name)
                shapes |= {f"{factors}.lora_a": (p.in_dim, r), f"{factors}.lora_b": (r, p.out_dim)}
            return shapes
        case AdapterConfig(bottleneck_dim=r):
            one = {"down": (c.embed_dim, r), "down_bias": (r,), "up": (r, c.embed_dim), "up_bias": (c.embed_dim,)}
            return {
                f"layers.{i}.{slot}.{name}": shape
                for i in range(c.num_layers)
                for slot in ("attn_adapter", "mlp_adapter")
                for name, shape in one.items()
            }
        case PromptConfig(num_tokens=p):
            return {"soft_prompt.embeddings": (p, c.embed_dim)}
        case PrefixConfig(num_tokens=p):
            return {
                f"layers.{i}.self_attn.prefix.{name}": (p, c.num_kv_heads, c.head_dim)
                for i in range(c.num_layers)
                for name in ("keys", "values")
            }
    raise ValueError(f"{type(peft_config).__name__} has no parameters beside the model's: save the model instead")


def _encode(
    peft_config: PeftConfig, arrays: dict[str, np.ndarray], c: LlamaConfig
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The fields of adapter_config.json and the tensors, by peft's names and layouts."""
    match peft_config:
        case LoraConfig():
            tensors = {}
            for name in lora_targets(c, peft_config.targets):
                for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                    value = arrays[f"{_lora_name(c, name)}.{ours}"]
                    tensors[f"base_model.model.model.{name}.{theirs}.weight"] = value.T
            alpha = int(peft_config.alpha) if peft_config.alpha == int(peft_config.alpha) else peft_config.alpha
            targets = _short_targets(lora_targets(c, peft_config.targets), c, prefix="model.")
            return {
                "peft_type": "LORA",
                "r": peft_config.rank,
                "lora_alpha": alpha,
                "bias": "none",
                "lora_dropout": peft_config.dropout,
                "target_modules": sorted(targets),
            }, tensors
        case AdapterConfig():
            return {"peft_type": "BOTTLENECK_ADAPTER", "bottleneck_dim": peft_config.bottleneck_dim}, arrays
        case PromptConfig():
            return {
                "peft_type": "PROMPT_TUNING",
                "num_virtual_tokens": peft_config.num_tokens,
                "token_dim": c.embed_dim,
                "num_layers": c.num_layers,
                "num_attention_heads": c.num_heads,
                "num_transformer_submodules": 1,
            }, {_PROMPT_TENSOR: arrays["soft_prompt.embeddings"]}
        case PrefixConfig():
            pairs = [
                arrays[f"layers.{i}.self_attn.prefix.{name}"]
                for i in range(c.num_layers)
                for name in ("keys", "values")
            ]
            joined = np.stack(pairs, axis=1).reshape(peft_config.num_tokens, -1)  # [P, layers * 2 * K * H]
            return {
                "peft_type": "PREFIX_TUNING",
                "num_virtual_tokens": peft_config.num_tokens,
                "token_dim": c.num_kv_heads * c.head_dim,
                "num_layers": c.num_layers,
                "num_attention_heads": c.num_kv_heads,
                "num_transformer_submodules": 1,
                "prefix_projection": False,
            }, {_PROMPT_TENSOR: joined}
    raise ValueError(f"{type(peft_config).__name__} is not in PEFT's format")


def _decode(
    peft_config: PeftConfig, tensors: dict[str, TensorInfo], c: LlamaConfig, file: pathlib.Path
) -> dict[str, jax.Array]:
    """Our parameters from the tensors; everything there must be used."""
    shapes = trainable_shapes(peft_config, c)
    used, found = set(), {}

    def read(name, shape):
        if name not in tensors:
            raise ValueError(f"{file}: tensor {name} is missing: expected shape {list(shape)}")
        if tensors[name].shape != tuple(shape):
            raise ValueError(f"{file}: tensor {name} has shape {list(tensors[name].shape)}: expected {list(shape)}")
        used.add(name)
        return np.array(map_tensor(tensors[name]), np.float32)

    match peft_config:
        case LoraConfig():
            for name in lora_targets(c, peft_config.targets):
                for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                    target = f"{_lora_name(c, name)}.{ours}"
                    found[target] = read(f"base_model.model.model.{name}.{theirs}.weight", shapes[target][::-1]).T
        case AdapterConfig():
            found = {name: read(name, shape) for name, shape in shapes.items()}
        case PromptConfig(num_tokens=p):
            found["soft_prompt.embeddings"] = read(_PROMPT_TENSOR, (p, c.embed_dim))
        case PrefixConfig(num_tokens=p):
            joined = read(_PROMPT_TENSOR, (p, c.num_layers * 2 * c.num_kv_heads * c.head_dim))
            joined = joined.reshape(p, 2 * c.num_layers, c.num_kv_heads, c.head_dim)
            found = {name: joined[:, i] for i, name in enumerate(shapes)}  # layer by layer, keys then values
    for name in sorted(set(tensors) - used):
        raise ValueError(f"{file}: tensor {name} is not expected: the configuration and the base have no place for it")
    return {name: jnp.asarray(np.ascontiguousarray(value)) for name, value in found.items()}


def _check_fields(raw: dict[str, Any], kind: str, file: pathlib.Path) -> None:
    """Refuses options that change the mathematics; an unknown field must be off (null, false, empty)."""
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(f"{file}: task_type is {raw['task_type']!r}: not implemented, expected 'CAUSAL_LM'")
    for name, value in raw.items():
        if name in _COMMON_FIELDS or name in _NEUTRAL_FIELDS[kind]:
            continue
        if name in _ALLOWED:
            if value not in _ALLOWED[name]:
                raise ValueError(f"{file}: {name} is {value!r}: not implemented, expected {_ALLOWED[name][0]!r}")
        elif value not in (None, False, {}, [], ""):
            raise ValueError(f"{file}: {name} is {value!r}: not implemented")
    if kind == "LORA" and raw.get("init_lora_weights") not in _INITIALIZATIONS:
        raise ValueError(
            f"{file}: init_lora_weights is {raw['init_lora_weights']!r}, which changes the base weights: "
            f"not implemented"
        )


def _lora_config(raw: dict[str, Any], tensors: dict[str, TensorInfo], c: LlamaConfig, file: pathlib.Path) -> LoraConfig:
    names = set()
    for name, info in tensors.items():
        match = _LORA_TENSOR.fullmatch(name)
        if match is None or match[1] not in projections(c):
            raise ValueError(
                f"{info.path}: tensor {name} is not expected: LoRA is implemented for the projections of "
                f"the {c.num_layers} layers"
            )
        names.add(match[1])
    if not names:
        raise ValueError(f"{file.with_name(WEIGHTS_FILE)}: has no LoRA tensors")
    rank, alpha = _integer(raw, "r", file), raw.get("lora_alpha", 8)
    dropout = raw.get("lora_dropout", 0.0)
    for field, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{file}: {field} is {value!r}: expected a number")
    if raw.get("use_rslora"):
        alpha = alpha * math.sqrt(rank)  # its scale is alpha / sqrt(r), ours alpha / r
    ordered = [name for name in projections(c) if name in names]
    return LoraConfig(rank=rank, alpha=float(alpha), dropout=float(dropout), targets=tuple(_short_targets(ordered, c)))


def _short_targets(names: list[str], c: LlamaConfig, *, prefix: str = "") -> list[str]:
    """["q_proj"] for projections that every layer has among `names`, full names (after `prefix`) for the others."""
    count: dict[str, int] = {}
    for name in names:
        short = name.rpartition(".")[2]
        count[short] = count.get(short, 0) + 1
    chosen = {}  # ordered, without repeats
    for name in names:
        short = name.rpartition(".")[2]
        chosen[short if count[short] == c.num_layers else prefix + name] = None
    return list(chosen)


def _lora_name(c: LlamaConfig, name: str) -> str:
    return f"{projections(c)[name].matrix}.lora.{name.rpartition('.')[2]}"


def _integer(raw: dict[str, Any], name: str, file: pathlib.Path) -> int:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{file}: {name} is {value!r}: expected an integer")
    return value
