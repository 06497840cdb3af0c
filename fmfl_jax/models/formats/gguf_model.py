"""LLaMA models in GGUF files, as llama.cpp and its converters write them.

Matrices are [out, in]. The rows of attn_q and attn_k are in the order of neighbouring rotary pairs (2 i, 2 i + 1), and
are put in ours (i, i + H/2). Q4_0 and Q4_1 are computed with as they are: blocks of 32 along the input dimension with
a float16 scale, W = (q - 8) d or W = q d + m, and so is a Q8_0 head, W = q d, where that is asked for. Every other type
is dequantized by the `gguf` package. llama.cpp writes LLaMA 3.1's rotary scaling as a tensor of factors, from which the
parameters are computed.
"""

import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.config import LlamaConfig, RopeScaling
from fmfl_jax.data.gguf_file import GgufFile, GgufTensor, read_gguf
from fmfl_jax.data.gguf_tokenizer import special_ids
from fmfl_jax.models.formats.config_json import end_tokens
from fmfl_jax.models.formats.huggingface import aligned_empty, to_device, transpose_into
from fmfl_jax.models.formats.llama2c import half_rotation
from fmfl_jax.models.params import param_specs, projections
from fmfl_jax.models.rope import rope_frequencies
from fmfl_jax.quant.int4 import Int4Weight
from fmfl_jax.quant.int8 import Int8Weight
from kernels.w4a16 import layout

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")
BLOCK = 32  # inputs per scale of Q4_0, Q4_1 and Q8_0
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_Q4_0_ZERO = 8
_ROWS = 1024  # rows dequantized or packed at a time, a multiple of layout.N_ALIGN
ROPE_FACTORS = "rope_freqs.weight"
_INNER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTER = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
# Metadata with which relatives of LLaMA change the mathematics: {key: the value that changes nothing}.
_NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "attention.scale": None,
    "attention.sliding_window": None,
    "attention.clamp_kqv": None,
    "rope.scaling.attn_factor": 1.0,
}


class Part(NamedTuple):
    """A tensor of the file that is a parameter, or some columns of one.

    columns: those of our [in, out] matrix; None: stored as it is. rotary: its rows are in neighbouring pairs.
    """

    name: str
    shape: tuple[int, ...]
    columns: slice | None = None
    rotary: bool = False


def gguf_parts(config: LlamaConfig) -> dict[str, list[Part]]:
    """{parameter name: its tensors in a GGUF file}."""
    matrices: dict[str, list[Part]] = {}
    for name, p in projections(config).items():
        _, layer, inner = name.split(".", 2)
        rotary = inner.endswith(("q_proj", "k_proj"))
        part = Part(f"blk.{layer}.{_INNER[inner]}.weight", (p.out_dim, p.in_dim), p.columns, rotary)
        matrices.setdefault(f"{p.matrix}.weight", []).append(part)
    found = {}
    for name, spec in param_specs(config).items():
        stem = name.removesuffix(".weight")
        if name in matrices:
            found[name] = matrices[name]
        elif stem == "lm_head":
            found[name] = [Part("output.weight", spec.shape[::-1], slice(0, config.vocab_size))]
        elif stem in _OUTER:
            found[name] = [Part(f"{_OUTER[stem]}.weight", spec.shape)]
        else:
            _, layer, inner = stem.split(".", 2)
            found[name] = [Part(f"blk.{layer}.{_INNER[inner]}.weight", spec.shape)]
    return found


def open_gguf(
    path: pathlib.Path, dtype: str | None, *, int8_head: bool = False
) -> tuple[LlamaConfig, dict[str, Callable[[], Any]], set[int]]:
    """The config, {parameter name: a function that reads it}, and the ids that end a text.

    dtype: what matrices are converted to; None keeps float32, float16 and bfloat16 and makes float32 of dequantized
    ones (and of a matrix whose parts are stored in different types). Q4_0 and Q4_1 stay packed.
    int8_head: so does a head, or the embedding in its place, that is Q8_0: an Int8Weight [D, V].

    Raises:
      ValueError: a damaged file; another architecture; metadata or a tensor that is missing, not expected, or asks for
        what is not implemented, by its name.
    """
    file = read_gguf(path)
    config = _config(file)
    used = {ROPE_FACTORS}
    found = {}
    head = "embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    for name, parts in gguf_parts(config).items():
        tensors = [_expect(file, used, part) for part in parts]
        if int8_head and name == head and tensors[0].type == "Q8_0":
            found[name] = functools.partial(_read_int8, tensors[0])
        else:
            found[name] = functools.partial(_read, parts, tensors, config.head_dim, dtype)
    for name in sorted(set(file.tensors) - used):
        raise ValueError(f"{path}: tensor {name} is not expected: this model has no place for it")
    return config, found, end_tokens(special_ids(file.metadata), path)


def _config(file: GgufFile) -> LlamaConfig:
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{file.path}: general.architecture is {architecture!r}: not implemented, expected 'llama'")
    for key, neutral in _NEUTRAL.items():
        value = file.metadata.get(f"llama.{key}", neutral)
        if value != neutral:
            raise ValueError(f"{file.path}: llama.{key} is {value!r}: not implemented, expected {neutral!r}")
    get = functools.partial(_number, file)
    embed_dim, num_heads = get("embedding_length", int), get("attention.head_count", int)
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: tensor token_embd.weight is missing")
    if num_heads < 1:
        raise ValueError(f"{file.path}: llama.attention.head_count is {num_heads}: expected at least 1")
    head_dim = get("attention.key_length", int, embed_dim // num_heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if get(key, int, head_dim) != head_dim:
            raise ValueError(f"{file.path}: llama.{key} is {get(key, int)}: not implemented, expected {head_dim}")
    rope_theta = get("rope.freq_base", float, 10000.0)
    try:
        return LlamaConfig(
            vocab_size=file.tensors["token_embd.weight"].shape[0],
            embed_dim=embed_dim,
            hidden_dim=get("feed_forward_length", int),
            num_layers=get("block_count", int),
            num_heads=num_heads,
            num_kv_heads=get("attention.head_count_kv", int, num_heads),
            head_dim=head_dim,
            rope_theta=rope_theta,
            norm_eps=get("attention.layer_norm_rms_epsilon", float),
            max_seq_len=get("context_length", int),
            tie_embeddings="output.weight" not in file.tensors,
            rope_scaling=_rope_scaling(file, head_dim, rope_theta),
        )
    except ValueError as e:
        raise e if str(file.path) in str(e) else ValueError(f"{file.path}: {e}") from e


def _number(file: GgufFile, key: str, kind: type, default: Any = None) -> Any:
    """llama.KEY as `kind`; a float is the shortest decimal that rounds to the float32 stored."""
    value = file.metadata.get(f"llama.{key}", default)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        what = "missing" if value is None else f"{value!r}"
        raise ValueError(f"{file.path}: llama.{key} is {what}: expected {'an integer' if kind is int else 'a number'}")
    return int(value) if kind is int else float(str(np.float32(value)))


def _rope_scaling(file: GgufFile, head_dim: int, theta: float) -> RopeScaling | None:
    kind = file.metadata.get("llama.rope.scaling.type", "none")
    old_factor = file.metadata.get("llama.rope.scale_linear")
    if kind == "none" and old_factor not in (None, 1.0):
        return RopeScaling(kind="linear", factor=_number(file, "rope.scale_linear", float))
    if kind == "linear":
        return RopeScaling(kind="linear", factor=_number(file, "rope.scaling.factor", float))
    if kind != "none":
        raise ValueError(
            f"{file.path}: llama.rope.scaling.type is {kind!r}: not implemented, expected 'none' or 'linear'"
        )
    if ROPE_FACTORS not in file.tensors:
        return None
    tensor = file.tensors[ROPE_FACTORS]
    if tensor.type != "F32" or tensor.shape != (head_dim // 2,):
        raise ValueError(f"{file.path}: tensor {ROPE_FACTORS} is {tensor.type} {list(tensor.shape)}")
    factors = tensor.rows().reshape(-1).view(np.float32)
    scaling = _llama3_scaling(factors.astype(np.float64), rope_frequencies(head_dim, theta, None).astype(np.float64))
    if scaling is None or not np.allclose(factors, rope_factors(head_dim, theta, scaling), rtol=1e-4):
        raise ValueError(f"{file.path}: tensor {ROPE_FACTORS} is no scaling of LLaMA 3's kind: not implemented")
    return scaling


def _llama3_scaling(factors: np.ndarray, frequencies: np.ndarray) -> RopeScaling | None:
    """The parameters that gave the factors, low_freq_factor 1 and high_freq_factor 4 as in all published models: the
    largest is `factor`, and one between tells the original context (`rope_frequencies`, solved for it)."""
    factor = round(float(factors.max()), 4)
    between = (factors > 1.001) & (factors < 0.999 * factor)
    if not between.any():
        return None
    keep = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
    original = np.median(2 * math.pi * (3 * keep + 1) / frequencies[between])
    return RopeScaling(kind="llama3", factor=factor, original_max_seq_len=max(1, round(float(original))))


def rope_factors(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """float32 [head_dim // 2]: what llama.cpp divides the unscaled frequencies by."""
    return rope_frequencies(head_dim, theta, None) / rope_frequencies(head_dim, theta, scaling)


def _expect(file: GgufFile, used: set[str], part: Part) -> GgufTensor:
    """The part's tensor, checked, and marked as used."""
    name = part.name
    if name not in file.tensors:
        raise ValueError(f"{file.path}: tensor {name} is missing: expected {list(part.shape)}")
    tensor = file.tensors[name]
    if tensor.shape != tuple(part.shape):
        raise ValueError(f"{file.path}: tensor {name} has shape {list(tensor.shape)}: expected {list(part.shape)}")
    if tensor.type not in TYPES:
        raise ValueError(f"{file.path}: tensor {name} is {tensor.type}: not implemented, expected {', '.join(TYPES)}")
    used.add(name)
    return tensor


def _read(parts: Sequence[Part], tensors: Sequence[GgufTensor], head_dim: int, dtype: str | None):
    """One parameter: a tensor as it is, or the parts of a matrix transposed side by side, packed where all are."""
    types = {tensor.type for tensor in tensors}
    if types <= {"Q4_0", "Q4_1"} and parts[0].columns is not None:
        return _read_int4(parts, tensors, head_dim)
    only = types.pop() if len(types) == 1 else None
    stored = jnp.dtype(FLOATS.get(only or "", "float32") if dtype is None else dtype)
    if parts[0].columns is None:
        out = aligned_empty(parts[0].shape, np.dtype(np.float32) if len(parts[0].shape) == 1 else stored)
        rows = out.reshape(-1, out.shape[-1])
        for start, block in _dequantized(tensors[0].rows(), tensors[0].type):
            rows[start : start + len(block)] = block
        return to_device(out)
    out = aligned_empty((parts[0].shape[1], sum(part.shape[0] for part in parts)), stored)
    for part, tensor in zip(parts, tensors):
        assert part.columns is not None  # all parts of a matrix have some
        for start, block in _dequantized(_rows(part, tensor, head_dim), tensor.type):
            first = part.columns.start + start
            transpose_into(out[:, first : first + len(block)], block)
    return to_device(out)


def _rows(part: Part, tensor: GgufTensor, head_dim: int) -> np.ndarray:
    """uint8 [out, bytes], in our rotary order."""
    return half_rotation(tensor.rows(), head_dim) if part.rotary else tensor.rows()


def _dequantized(rows: np.ndarray, kind: str) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, float32 [R, in]) of some rows uint8 [out, bytes] at a time."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    for start in range(0, len(rows), _ROWS):
        yield start, dequantize(np.ascontiguousarray(rows[start : start + _ROWS]), GGMLQuantizationType[kind])


def _read_int4(parts: Sequence[Part], tensors: Sequence[GgufTensor], head_dim: int) -> Int4Weight:
    """The parts side by side, their integers and scales as they are stored.

    Where all are Q4_0 the zero points are the integer 8; otherwise every group has a minimum (-8 d for Q4_0: exact).
    """
    k, n = parts[0].shape[1], sum(part.shape[0] for part in parts)
    minima = any(tensor.type == "Q4_1" for tensor in tensors)
    q = np.empty((k, n), np.uint8)
    scale = np.empty((k // BLOCK, n), np.float16)
    zero_point = np.empty(scale.shape, np.float16) if minima else np.full(scale.shape, _Q4_0_ZERO, np.uint8)
    for part, tensor in zip(parts, tensors):
        rows = _rows(part, tensor, head_dim)
        blocks = rows.reshape(len(rows), k // BLOCK, -1)  # [out, K / 32, bytes of a block]
        floats = np.ascontiguousarray(blocks[..., : -BLOCK // 2]).view(np.float16)  # d, or d and m
        nibbles = blocks[..., -BLOCK // 2 :]
        values = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)  # the first 16 inputs are the low nibbles
        transpose_into(q[:, part.columns], values.reshape(len(rows), k))
        scale[:, part.columns] = floats[..., 0].T
        if minima:
            minimum = floats[..., 1] if tensor.type == "Q4_1" else -np.float16(_Q4_0_ZERO) * floats[..., 0]
            zero_point[:, part.columns] = minimum.T
    return jax.tree.map(to_device, Int4Weight.pack(q, scale, zero_point, group_size=BLOCK))


def _read_int8(tensor: GgufTensor) -> Int8Weight:
    """A Q8_0 matrix [out, in] as [in, out], its integers and scales as they are stored.

    Some rows at a time, so that little more than the weight itself is held.
    """
    n, k = tensor.shape
    _, padded = layout.padded_shape(2 * k, n)
    shapes = layout.packed_shapes(2 * k, n, BLOCK)
    dtypes = {"qweight": np.int32, "scale": np.float16, "zero_point": np.int32}
    whole = {name: aligned_empty(shape, dtypes[name]) for name, shape in shapes.items()}
    rows = tensor.rows()
    for start in range(0, n, _ROWS):
        blocks = rows[start : start + _ROWS].reshape(-1, k // BLOCK, 2 + BLOCK)  # a float16 scale, 32 integers
        q = blocks[..., 2:].reshape(-1, k).view(np.int8).T
        scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].T
        piece = Int8Weight.pack(q, scale, group_size=BLOCK).halves
        for name, array in whole.items():
            columns = getattr(piece, name)
            first = start * array.shape[1] // padded
            array[:, first : first + columns.shape[1]] = columns
    qweight, scale, zero_point = (to_device(whole[name]) for name in ("qweight", "scale", "zero_point"))
    return Int8Weight(Int4Weight(qweight, scale, zero_point, (2 * k, n), BLOCK))
