"""Hugging Face's config.json <-> LlamaConfig.

The names and defaults are those of transformers' LlamaConfig. A field that changes the mathematics and is not
implemented here is an error, never ignored.
"""

import json
import pathlib
from typing import Any

from fmfl_jax.config import LlamaConfig, RopeScaling

_REQUIRED = object()
# Fields with which LLaMA's relatives change the mathematics: {name: the values that change nothing}.
_NEUTRAL = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": (None, "silu"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "sliding_window": (None, 0),
    "use_sliding_window": (False, None),
    "attention_multiplier": (None,),
    "embedding_multiplier": (1.0, None),
    "residual_multiplier": (1.0, None),
    "logits_scaling": (1.0, None),
    "logit_scale": (1.0, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "use_qk_norm": (False, None),
    "qk_layernorm": (False, None),
    "clip_qkv": (None,),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "attention_chunk_size": (None,),
    "alibi": (False, None),
    "parallel_attn": (False, None),
    "use_parallel_residual": (False, None),
    "use_bidirectional_attention": (False, None),
    "is_decoder": (True, False, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
}
_ROPE_FIELDS = {
    "default": {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"},
    "linear": {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"},
    "llama3": {
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    },
}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file. Raises FileNotFoundError, or ValueError for anything else."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: not JSON ({e})") from e
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def parse_config(raw: dict[str, Any], path: pathlib.Path) -> LlamaConfig:
    """The LlamaConfig of a config.json's content; `path` is for the messages.

    Raises:
      ValueError: a field missing, of the wrong type, or asking for mathematics that is not implemented.
    """
    if raw.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type is {raw.get('model_type')!r}: expected 'llama'")
    for name, neutral in _NEUTRAL.items():
        if name in raw and raw[name] not in neutral:
            raise ValueError(f"{path}: {name} is {raw[name]!r}: not implemented, expected {neutral[0]!r}")
    embed_dim = _number(raw, "hidden_size", int, path)
    num_heads = _number(raw, "num_attention_heads", int, path)
    num_kv_heads = _number(raw, "num_key_value_heads", int, path, num_heads)
    if raw.get("head_dim") is None and (num_heads < 1 or embed_dim % num_heads):
        raise ValueError(
            f"{path}: hidden_size {embed_dim} is no multiple of num_attention_heads {num_heads}, and "
            f"there is no head_dim"
        )
    rope_theta, rope_scaling = _rope(raw, path)
    tied = raw.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"{path}: tie_word_embeddings is {tied!r}: expected true or false")
    try:
        return LlamaConfig(
            vocab_size=_number(raw, "vocab_size", int, path),
            embed_dim=embed_dim,
            hidden_dim=_number(raw, "intermediate_size", int, path),
            num_layers=_number(raw, "num_hidden_layers", int, path),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_number(raw, "head_dim", int, path, embed_dim // num_heads),
            rope_theta=rope_theta,
            norm_eps=_number(raw, "rms_norm_eps", float, path, 1e-6),
            max_seq_len=_number(raw, "max_position_embeddings", int, path, 2048),
            tie_embeddings=tied,
            rope_scaling=rope_scaling,
        )
    except ValueError as e:
        raise e if str(path) in str(e) else ValueError(f"{path}: {e}") from e


def end_tokens(raw: dict[str, Any], path: pathlib.Path) -> set[int]:
    """The ids of eos_token_id in a config.json's or generation_config.json's content: none, one, or a list of them."""
    value = raw.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"{path}: eos_token_id is {value!r}: expected an integer or a list of integers")
    return set(ids)


def config_json(config: LlamaConfig, *, dtype: str, quantization: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of config.json for a model whose matrices are stored in `dtype`.

    The rotary fields are written as transformers 4 has them, which version 5 reads too.
    """
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
    }
    scaling = config.rope_scaling
    if scaling is not None:
        raw["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            raw["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_seq_len,
            }
    if quantization is not None:
        raw["quantization_config"] = quantization
    return raw


def _rope(raw: dict[str, Any], path: pathlib.Path) -> tuple[float, RopeScaling | None]:
    """theta and scaling from rope_theta and rope_scaling (transformers 4) or rope_parameters (transformers 5)."""
    theta = _number(raw, "rope_theta", float, path, None)
    kind, fields, field = "default", {}, "rope_parameters"
    for name in ("rope_scaling", "rope_parameters"):
        value = raw.get(name)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {name} is {value!r}: expected an object")
        if fields and value != fields:
            raise ValueError(f"{path}: rope_scaling and rope_parameters are both given and differ")
        fields, field = value, name
        kind = value.get("rope_type", value.get("type", "default"))
    if kind not in _ROPE_FIELDS:
        raise ValueError(
            f"{path}: {field} has rope type {kind!r}: not implemented, expected one of "
            f"{', '.join(map(repr, _ROPE_FIELDS))}"
        )
    for name, value in fields.items():
        if name not in _ROPE_FIELDS[kind] and not (name == "partial_rotary_factor" and value in (1.0, None)):
            raise ValueError(f"{path}: {field}.{name} is {value!r}: not implemented for rope type {kind!r}")
    inner = _number(fields, "rope_theta", float, path, None)
    if theta is not None and inner is not None and theta != inner:
        raise ValueError(f"{path}: rope_theta is {theta}, but {field}.rope_theta is {inner}")
    theta = next((x for x in (theta, inner) if x is not None), 10000.0)
    if kind == "default":
        return theta, None
    numbers = dict(kind=kind, factor=_number(fields, "factor", float, path))
    if kind == "llama3":
        numbers |= dict(
            low_freq_factor=_number(fields, "low_freq_factor", float, path),
            high_freq_factor=_number(fields, "high_freq_factor", float, path),
            original_max_seq_len=_number(fields, "original_max_position_embeddings", int, path),
        )
    try:
        return theta, RopeScaling(**numbers)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def _number(raw: dict[str, Any], name: str, kind: type, path: pathlib.Path, default: Any = _REQUIRED) -> Any:
    """raw[name] as `kind` (int or float); the default for a missing or null field."""
    value = raw.get(name)
    if value is None:
        if default is _REQUIRED:
            raise ValueError(f"{path}: {name} is missing: expected {'an integer' if kind is int else 'a number'}")
        return default
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise ValueError(f"{path}: {name} is {value!r}: expected {'an integer' if kind is int else 'a number'}")
    return kind(value)
