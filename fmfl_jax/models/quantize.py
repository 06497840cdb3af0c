"""Quantizes a LLaMA block by block: round to nearest, GPTQ (models/gptq.py), or AWQ (quant/awq.py) with its scales
folded away.

The LLaMA pairs of AWQ (Lin et al., MLSys 2024): input_layernorm -> q, k, v; v -> o where their shapes agree (not with
grouped queries); post_attention_layernorm -> gate, up; up -> down. The search looks at the attention's output for
q, k, v, at the MLP's for gate and up, at the product itself for o and down. A block is calibrated on the outputs of
the *unquantized* blocks before it, as the reference implementations do it.

The recipe "paper" is that, its clip search on about 512 tokens. The default, "clip", differs (docs/results/awq.md says
what each was measured to give):
  - A token's squared error is divided by the mean square of the block's output there, since the next RMSNorm divides by
    that. On TinyStories-656K this gave no consistent gain.
  - q and k are clipped too; the clip search sees all tokens, and counts them for q, k, v as GPTQ does (models/gptq.py).
  - What comes out is refined (quant/refine.py), so it is not AWQ alone: steps by least squares, integers by coordinate
    descent.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fmfl_jax.config import LlamaConfig
from fmfl_jax.models.calibration import (
    DOWN,
    GATE_UP,
    INPUT_NORM,
    MATRICES,
    NORMS,
    POST_NORM,
    QKV,
    O,
    attention_given_and_received,
    block_functions,
    gram_bands,
    gram_of,
    in_passes,
    sum_over_passes,
    token_weight,
)
from fmfl_jax.models.gptq import gptq_block
from fmfl_jax.quant.awq import (
    OutputLoss,
    QuantConfig,
    product_loss,
    search_clip,
    search_scale,
    search_scale_and_clip,
    search_symmetric_clip,
)
from fmfl_jax.quant.int4 import Int4Weight
from fmfl_jax.quant.int8 import Int8Weight
from fmfl_jax.quant.refine import pack_clipped
from fmfl_jax.quant.rtn import pack_weight

_GROUP_SIZES = (128, 64, 32, 16, 8)  # the published models' first
_NUM_SAMPLES = 512  # tokens that the paper's clip search sees


def quantize(
    config: LlamaConfig, params: Mapping, windows, quant: QuantConfig, *, on_block: Callable[[int], None] | None = None
) -> dict:
    """The parameters with every projection of the blocks as an Int4Weight; embedding, norms and head stay as they are.

    Args:
      params: name -> array. Every tensor is read once, block by block, so a mapping that reads from a file when asked
        never has more than one unquantized block in memory.
      windows: int32 [B, T], calibration tokens; not looked at for round to nearest, may be None.
      on_block: called with the number of blocks done, after each.

    Raises:
      ValueError: AWQ or GPTQ without calibration windows, token ids outside the vocabulary, or weights that are packed
        already.
    """
    quant = with_group_size(quant, config)
    out = {name: params[name] for name in params if not name.startswith("layers.")}
    h = _embed_windows(config, out["embed_tokens.weight"], windows) if quant.needs_text else None
    for i in range(config.num_layers):
        block = {name: _read(params, f"layers.{i}.{name}") for name in MATRICES + NORMS}
        match quant.method:
            case "awq":
                block, h = awq_block(block, h, config=config, quant=quant)
            case "gptq":
                block, h = gptq_block(block, h, config=config, quant=quant)
            case _:
                block = rtn_block(block, quant=quant)
        jax.block_until_ready(block)
        out |= {f"layers.{i}.{name}": value for name, value in block.items()}
        if on_block is not None:
            on_block(i + 1)
    return out


def _read(params, name):
    value = params[name]
    if isinstance(value, Int4Weight):
        raise ValueError(
            f"{name} holds 4-bit integers already: quantizing needs an unquantized (or dequantized) checkpoint"
        )
    return jnp.asarray(value)


def _input_dims(config: LlamaConfig) -> dict[str, int]:
    return {
        "embed_dim": config.embed_dim,
        "num_heads * head_dim": config.num_heads * config.head_dim,
        "hidden_dim": config.hidden_dim,
    }


def with_group_size(
    quant: QuantConfig, config: LlamaConfig, say: Callable[[str], None] = lambda line: None
) -> QuantConfig:
    """The QuantConfig with a group size where it has none: the largest of 128, 64, 32, 16, 8 that divides all input
    dimensions. say: told, in a line, where that is not 128.

    Raises ValueError where none of them does.
    """
    if quant.group_size is not None:
        return quant
    dims = _input_dims(config)
    common = math.gcd(*dims.values())
    size = next((size for size in _GROUP_SIZES if common % size == 0), None)
    told = ", ".join(f"{name} {dim}" for name, dim in dims.items())
    if size is None:
        raise ValueError(f"no group size of {', '.join(map(str, _GROUP_SIZES))} divides {told}: choose --group_size")
    if size != _GROUP_SIZES[0]:
        say(f"group size {size}: {_GROUP_SIZES[0]} does not divide the model's dimensions ({told})")
    return dataclasses.replace(quant, group_size=size)


def check_group_size(config: LlamaConfig, group_size: int) -> None:
    """Raises ValueError where the group size does not divide an input dimension: AutoAWQ's format cannot hold that."""
    for name, dim in _input_dims(config).items():
        if group_size != -1 and dim % group_size:
            raise ValueError(
                f"group_size {group_size} does not divide the model's {name} of {dim}: AutoAWQ's format "
                "cannot hold that; choose a divisor, or -1 for one group"
            )


def head_group_size(config: LlamaConfig) -> int:
    """32 as in GGUF's blocks, less where that does not divide the head's rows."""
    return math.gcd(config.embed_dim, 32)


def quantize_head(config: LlamaConfig, params: Mapping, *, bits: int, group_size: int) -> tuple[LlamaConfig, dict]:
    """The model with a head rounded to nearest: 3, 4 or 8 bits instead of 16 or 32 to read per weight and token.

    4 bits cost some accuracy, 8 hardly any. Where the head is the embedding, 8 bits take its place, and tokens are
    looked up in them. At fewer the model gets a packed copy beside it and is tied no more, since an embedding of 4 bits
    would cost more. A head that is packed already stays.

    params: where they are read from a file when asked for, the head is first, and gone before the others are there.
    """
    tied, name = config.tie_embeddings, "embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    head = params[name]
    if not isinstance(head, Int4Weight | Int8Weight):
        head = jax.block_until_ready(_pack_head(head, bits, group_size, tied))
    if tied and bits < 8:
        return dataclasses.replace(config, tie_embeddings=False), dict(params) | {"lm_head.weight": head}
    return config, {other: head if other == name else params[other] for other in params}


@functools.partial(jax.jit, static_argnames=("bits", "group_size", "tied"))
def _pack_head(weight, bits, group_size, tied):
    weight = weight.T if tied else weight
    if bits == 8:
        return Int8Weight.round(weight, group_size=group_size)
    return pack_weight(weight, bits=bits, group_size=group_size)


def _embed_windows(config, embedding, windows):
    if windows is None or len(windows) == 0:
        raise ValueError("AWQ and GPTQ need calibration windows, int32 [B, T]: got none")
    windows = jnp.asarray(windows, jnp.int32)
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"calibration token ids {low}..{high} are not within the vocabulary of {config.vocab_size}")
    return jnp.take(jnp.asarray(embedding), windows, axis=0).astype(config.dtype)  # [B, T, D]


@functools.partial(jax.jit, static_argnames="quant")
def rtn_block(block: dict, *, quant: QuantConfig) -> dict:
    """The block's matrices rounded to nearest."""
    packed = {name: pack_weight(block[name], bits=quant.bits, group_size=quant.known_group_size) for name in MATRICES}
    return block | packed


@functools.partial(jax.jit, static_argnames=("config", "quant"), donate_argnames="h")
def awq_block(block: dict, h, *, config: LlamaConfig, quant: QuantConfig):
    """Quantizes one block by AWQ.

    Args:
      block: {name within the block: array}.
      h: [B, T, D] the block's input on the calibration windows, in the compute dtype.

    Returns:
      (block with Int4Weight matrices and folded norms, h [B, T, D] the unquantized block's output).
    """
    block = {name: value.astype(jnp.float32) for name, value in block.items()}
    h = in_passes(h)
    stats, outputs = _statistics(block, h, config, quant)
    scales, clipped = _search(block, h, stats, outputs, config, quant)
    h_next = (outputs["h_mid"] + outputs["mlp"]).reshape(-1, *h.shape[2:])
    rounded = fold(block | clipped, scales, config)
    if quant.recipe == "paper":
        return rtn_block(rounded, quant=quant), h_next
    return _refined(fold(block, scales, config), rounded, scales, stats, quant), h_next


def _refined(block, clipped, scales, stats, quant) -> dict:
    """The folded block in 4 bits: refined (quant/refine.py) from its clipped matrices' rounding."""
    packed = {}
    for name in MATRICES:
        gram = stats[name].gram / (scales[name][:, None] * scales[name][None])
        packed[name] = pack_clipped(
            block[name], clipped[name], gram, bits=quant.bits, group_size=quant.known_group_size
        )
    return block | packed


class Statistics(NamedTuple):
    """Of a matrix's inputs: mean |x| float32 [K]; X' X [K, K], tokens weighted; "paper" only: inputs float32 [S, K]."""

    x_mean: jax.Array
    gram: jax.Array
    samples: jax.Array | None


def _statistics(block, h, config, quant) -> tuple[dict[str, Statistics], dict]:
    """One pass over the calibration tokens with the unquantized block.

    Returns:
      ({matrix: Statistics}, outputs [passes, windows, T, D] of: "attn", the attention; "h_mid", what the MLP's norm is
      given; "mlp", the MLP; and "weight" [passes, windows, T, 1] of tokens).
    """
    norm, _, mlp_hidden = block_functions(config)
    num_tokens = h.shape[0] * h.shape[1] * h.shape[2]
    stride = min(max(num_tokens // _NUM_SAMPLES, 1), num_tokens // h.shape[0])

    def one_pass(h):
        x = {QKV: norm(block[INPUT_NORM], h)}
        x[O], received = attention_given_and_received(block[QKV], x[QKV], config)
        attn = x[O] @ block[O].astype(h.dtype)
        h_mid = h + attn
        x[GATE_UP] = norm(block[POST_NORM], h_mid)
        x[DOWN] = mlp_hidden(block[GATE_UP], x[GATE_UP])
        mlp = x[DOWN] @ block[DOWN].astype(h.dtype)
        weight = counts = jnp.ones((*h.shape[:-1], 1), jnp.float32)
        if quant.recipe == "clip":
            weight, counts = token_weight(h_mid + mlp), 1.0 + received
        weights = dict.fromkeys(MATRICES, weight) | {QKV: counts}
        x = {name: value.reshape(-1, value.shape[-1]).astype(jnp.float32) for name, value in x.items()}
        new = {name: (jnp.sum(jnp.abs(value), axis=0), gram_bands(value, weights[name])) for name, value in x.items()}
        samples = {name: value[::stride] for name, value in x.items()} if quant.recipe == "paper" else {}
        return new, ({"attn": attn, "h_mid": h_mid, "mlp": mlp, "weight": weight}, samples)

    sums, (outputs, samples) = sum_over_passes(one_pass, h)
    samples = {name: x.reshape(-1, x.shape[-1]) for name, x in samples.items()}
    return {
        name: Statistics(total / num_tokens, gram_of(bands), samples.get(name)) for name, (total, bands) in sums.items()
    }, outputs


def _search(block, h, stats, outputs, config, quant) -> tuple[dict, dict]:
    """{matrix: s float32 [K]}, ones for o where v's columns do not match its rows, and {matrix: clipped weight}."""
    norm, attention, mlp_hidden = block_functions(config)

    def loss(module, inputs, wanted):
        def of(weight, i):
            e = module(weight, inputs[i]).astype(jnp.float32) - wanted[i].astype(jnp.float32)
            return jnp.sum(outputs["weight"][i] * e * e, axis=-1).ravel()

        return OutputLoss(of, num_passes=inputs.shape[0])

    def attention_of(qkv, h):
        return attention(qkv, block[O], norm(block[INPUT_NORM], h))

    def mlp_of(gate_up, h):
        return mlp_hidden(gate_up, norm(block[POST_NORM], h)) @ block[DOWN].astype(h.dtype)

    losses = {
        QKV: loss(attention_of, h, outputs["attn"]),
        O: product_loss(block[O], stats[O].gram),
        GATE_UP: loss(mlp_of, outputs["h_mid"], outputs["mlp"]),
        DOWN: product_loss(block[DOWN], stats[DOWN].gram),
    }
    found = {}
    for name in MATRICES:
        fixed = name == O and config.num_kv_heads != config.num_heads
        search = _paper_search if quant.recipe == "paper" else _clip_search
        found[name] = search(block[name], stats[name], None if fixed else losses[name], quant)
    if quant.recipe == "paper":
        qk = (config.num_heads + config.num_kv_heads) * config.head_dim
        s, w = found[QKV]
        found[QKV] = s, jnp.concatenate([block[QKV][:, :qk], w[:, qk:]], axis=1)
    return {name: s for name, (s, _) in found.items()}, {name: clipped for name, (_, clipped) in found.items()}


def _clip_search(weight, stats: Statistics, output_loss: OutputLoss | None, quant: QuantConfig):
    """(s float32 [K], clipped weight float32 [K, N]); no loss: s stays ones."""
    if output_loss is None:
        return jnp.ones(weight.shape[0], jnp.float32), search_clip(weight, stats.gram, quant)
    return search_scale_and_clip(weight, stats.x_mean, stats.gram, output_loss, quant)


def _paper_search(weight, stats: Statistics, output_loss: OutputLoss | None, quant: QuantConfig):
    """As `_clip_search`."""
    s = jnp.ones(weight.shape[0], jnp.float32)
    if output_loss is not None:
        s = search_scale(weight, stats.x_mean, output_loss, quant)
    assert stats.samples is not None  # gathered for this recipe
    return s, search_symmetric_clip(weight * s[:, None], stats.samples / s[None], quant) / s[:, None]


def fold(block: dict, scales: dict, config: LlamaConfig) -> dict:
    """The same function with each matrix's rows multiplied by its scale, and the operation before it divided.

    scales: {matrix: s float32 [K]}; s of o must be ones with grouped queries.
    """
    block = {name: value * scales[name][:, None] if name in scales else value for name, value in block.items()}
    block[INPUT_NORM] = block[INPUT_NORM] / scales[QKV]
    block[POST_NORM] = block[POST_NORM] / scales[GATE_UP]
    if config.num_kv_heads == config.num_heads:
        block[QKV] = _divide_last_columns(block[QKV], scales[O])
    block[GATE_UP] = _divide_last_columns(block[GATE_UP], scales[DOWN])
    return block


def _divide_last_columns(w, s):
    """w [K, N] with its last len(s) columns divided by s: those of v in qkv, of up in gate_up."""
    return w / jnp.concatenate([jnp.ones(w.shape[1] - s.shape[0], s.dtype), s])[None]
