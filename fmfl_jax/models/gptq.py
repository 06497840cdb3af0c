"""Quantizes a LLaMA block by GPTQ (quant/gptq.py; Frantar et al., ICLR 2023), matrix after matrix.

As in the authors' code with `true_sequential`, every matrix is calibrated on what it is given by the quantized blocks
and matrices before it.

What a token counts in a matrix's calibration:
  - gate and up: all alike, as an RMSNorm has made their inputs alike.
  - q, k, v: 1 for its query, and for its key and value the attention that it gets (as in RSQ; Sung et al., arXiv
    2503.01820). Trained models attend to the first token from everywhere. Where that counts for one among many, errors
    are moved into its key and value (docs/results/awq.md).
  - o and down, whose output is added to the residual stream h: 1 / mean(h^2), what the next RMSNorm makes of an error.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fmfl_jax.config import LlamaConfig
from fmfl_jax.models.calibration import (
    DOWN,
    GATE_UP,
    INPUT_NORM,
    MATRICES,
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
from fmfl_jax.quant.awq import QuantConfig
from fmfl_jax.quant.gptq import pack_compensated


@functools.partial(jax.jit, static_argnames=("config", "quant"), donate_argnames="h")
def gptq_block(block: dict, h, *, config: LlamaConfig, quant: QuantConfig):
    """Quantizes one block.

    Args:
      block: {name within the block: array}.
      h: [B, T, D] the *quantized* blocks' output before this one on the calibration windows, in the compute dtype.

    Returns:
      (block with Int4Weight matrices, h [B, T, D] the quantized block's output).
    """
    norm, attention, mlp_hidden = block_functions(config)
    weights = {name: block[name].astype(jnp.float32) for name in MATRICES}
    identity = jnp.eye(weights[O].shape[0], dtype=jnp.float32)  # in o's place: the attention returns what o is given
    packed = {}

    def rounded(name: str, of: Callable, streams):
        """The matrix rounded and back. of(a pass of streams) -> its input [..., K] and what tokens count [..., 1]."""
        gram = _gram(of, streams)
        packed[name] = pack_compensated(weights[name], gram, bits=quant.bits, group_size=quant.known_group_size)
        return packed[name].dequantize(h.dtype)

    def attention_input(h):
        return norm(block[INPUT_NORM], h)

    def qkv_inputs(h):
        x = attention_input(h)
        return x, 1.0 + attention_given_and_received(weights[QKV], x, config)[1]

    def mlp_input(h):
        return norm(block[POST_NORM], h)

    h = in_passes(h)  # [passes, windows, T, D]
    qkv = rounded(QKV, qkv_inputs, h)
    x = jax.lax.map(lambda h: attention(qkv, identity, attention_input(h)), h)
    o = rounded(O, lambda hx: (hx[1], token_weight(hx[0] + _product(hx[1], weights[O]))), (h, x))
    h = h + _product(x, o)
    gate_up = rounded(GATE_UP, lambda h: (mlp_input(h), jnp.ones((*h.shape[:-1], 1))), h)

    def down_input(h):
        return mlp_hidden(gate_up, mlp_input(h))

    def down_inputs(h):
        x = down_input(h)
        return x, token_weight(h + _product(x, weights[DOWN]))

    down = rounded(DOWN, down_inputs, h)
    h = jax.lax.map(lambda h: h + _product(down_input(h), down), h)
    return block | packed, h.reshape(-1, *h.shape[2:])


def _product(x, weight):
    return x @ weight.astype(x.dtype)


def _gram(of: Callable, streams):
    """X' diag(weight of the tokens) X float32 [K, K] over the passes; of: see `gptq_block`."""

    def bands(stream):
        x, weight = of(stream)
        return gram_bands(x.reshape(-1, x.shape[-1]).astype(jnp.float32), weight), None

    return gram_of(sum_over_passes(bands, streams)[0])
