"""What quantizing a LLaMA block is calibrated with: the block's parts as pure functions, and its windows in passes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from fmfl_jax.config import LlamaConfig
from fmfl_jax.models.attention import attend_received
from fmfl_jax.models.llama import abstract_llama
from fmfl_jax.models.params import from_dict
from fmfl_jax.models.rope import apply_rope, rope_frequencies, rope_tables

MATRICES = ("self_attn.qkv_proj.weight", "self_attn.o_proj.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight")
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
QKV, O, GATE_UP, DOWN = MATRICES
INPUT_NORM, POST_NORM = NORMS
_BANDS = 4
_TOKENS_PER_PASS = 512  # calibration tokens at a time: a few MB of hidden activations stay in a CPU cache


def in_passes(h):
    """[B, T, D] -> [passes, windows, T, D], of as many windows as divide B and have at most _TOKENS_PER_PASS tokens."""
    num_windows, seq_len, dim = h.shape
    most = max(1, _TOKENS_PER_PASS // seq_len)
    per_pass = max(n for n in range(1, min(most, num_windows) + 1) if num_windows % n == 0)
    return h.reshape(num_windows // per_pass, per_pass, seq_len, dim)


def block_functions(config: LlamaConfig):
    """(norm(weight, h), attention(qkv, o, x), mlp_hidden(gate_up, x)): the model's own modules as pure functions."""
    abstract = abstract_llama(config).layers[0]
    attn_graphdef, attn_state = nnx.split(abstract.self_attn)
    norm_graphdef, norm_state = nnx.split(abstract.input_layernorm)
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)

    def norm(weight, h):
        return nnx.merge(norm_graphdef, from_dict(norm_state, {"weight": weight}))(h)

    def attention(qkv, o, x):
        module = nnx.merge(attn_graphdef, from_dict(attn_state, {"qkv_proj.weight": qkv, "o_proj.weight": o}))
        rope = rope_tables(jnp.arange(x.shape[1], dtype=jnp.int32)[None], frequencies)
        return module(x, rope, None, None, None)[0]

    def mlp_hidden(gate_up, x):
        gate, up = jnp.split(x @ gate_up.astype(x.dtype), 2, axis=-1)
        return jax.nn.silu(gate) * up

    return norm, attention, mlp_hidden


def attention_given_and_received(qkv, x, config: LlamaConfig):
    """What o is given, [B, T, N H], and the attention that a token gets (`attend_received`), float32 [B, T, 1].

    qkv float32 [D, (N + 2 K) H], x [B, T, D] the attention's input.
    """
    n, k, d = config.num_heads, config.num_kv_heads, config.head_dim
    batch, t = x.shape[:2]
    rope = rope_tables(
        jnp.arange(t, dtype=jnp.int32)[None], rope_frequencies(d, config.rope_theta, config.rope_scaling)
    )
    q_key, value = jnp.split((x @ qkv.astype(x.dtype)).reshape(batch, t, n + 2 * k, d), [n + k], axis=2)
    q, key = jnp.split(apply_rope(q_key, *rope), [n], axis=2)  # [B, T, N, H], [B, T, K, H]
    given, received = attend_received(q, key, value)
    return given.reshape(batch, t, n * d), received[..., None]


def sum_over_passes(of: Callable, streams):
    """of(a pass of streams [passes, ...]) -> (what is added up, what is kept): (the sums, all that is kept)."""
    like, _ = jax.eval_shape(of, jax.tree.map(lambda leaf: leaf[0], streams))

    def add_pass(sums, stream):
        new, kept = of(stream)
        return jax.tree.map(jnp.add, sums, new), kept

    return jax.lax.scan(add_pass, jax.tree.map(jnp.zeros_like, like), streams)


def gram_bands(x, weight) -> tuple:
    """The upper triangle of X' diag(weight) X of inputs x float32 [n, K] whose tokens count weight [..., 1], n of them.

    Returns bands of it, float32 [rows, K - the first row], which `gram_of` puts together once they are summed up: five
    eighths of the arithmetic.
    """
    weighted, k = x * weight.reshape(-1, 1), x.shape[1]
    height = -(-k // _BANDS)
    starts = range(0, k, height)
    return tuple(jnp.dot(x[:, i : i + height].T, weighted[:, i:], precision="highest") for i in starts)


def gram_of(bands: tuple):
    """The symmetric matrix float32 [K, K] of `gram_bands`."""
    k = bands[0].shape[1]
    upper = jnp.triu(jnp.concatenate([jnp.pad(band, ((0, 0), (k - band.shape[1], 0))) for band in bands]))
    return upper + jnp.triu(upper, 1).T


def token_weight(h):
    """h [..., D], the block's output -> float32 [..., 1], 1 / mean(h^2): what the next norm makes of an error there."""
    h = h.astype(jnp.float32)
    return 1.0 / (jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6)
