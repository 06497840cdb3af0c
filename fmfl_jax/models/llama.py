"""LLaMA (Touvron et al., 2023) as a Flax NNX module, with slots for parameter-efficient tuning.

    h = h + Attention(RMSNorm(h));  h = h + W_down(silu(W_gate RMSNorm(h)) * W_up RMSNorm(h))

Projections that share an input are one matrix: `qkv_proj` [D, (N + 2 K) H] and `gate_up_proj` [D, 2 F]. One large
product is faster than three small ones on every backend; files keep the published names (models/formats).

Every weight matrix is stored [in, out] and may be an array or an Int4Weight. Slots (`lora`, `adapter`, `prefix`,
`soft_prompt`) are None in a base model; fmfl_jax.peft fills them. Shape letters: B batch, T query length, S key
length, D embed, N heads, K kv heads, H head_dim, F hidden, V vocab, P prompt length.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fmfl_jax.config import LlamaConfig
from fmfl_jax.models import layer_loop
from fmfl_jax.models.attention import attend, attend_cached
from fmfl_jax.models.kv_cache import KVCache, of_layer, write, write_prefix
from fmfl_jax.models.peft_slots import AdapterSlot, LoraSlot, PrefixSlot, PromptSlot
from fmfl_jax.models.rope import apply_rope, rope_frequencies, rope_tables
from fmfl_jax.models.tensor_parallel import look_up_cut
from fmfl_jax.parallel import enter_cut, gather_cut, leave_cut
from fmfl_jax.quant.int8 import Int8Weight
from fmfl_jax.quant.linear import (
    add_norm,
    decodes_fused,
    decodes_looped,
    look_up,
    matmul,
    matmul_attend,
    matmul_norm,
    matmul_swiglu,
    matmul_swiglu_step,
    swiglu_zeros,
    turned_product,
)
from kernels.decode.unfinished import Unfinished, finish, finished
from kernels.w4a16.api import attend_layer


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32, returned in x's dtype."""

    def __init__(self, dim: int, eps: float):
        self.weight = nnx.Param(jnp.ones(dim, jnp.float32))
        self.eps = eps

    def __call__(self, x):
        return self.normalized(x, self.weight.get_value())

    def normalized(self, x, weight):
        """The norm of x [..., D] with this weight [D]."""
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * _broadcast(weight.astype(jnp.float32), x.ndim)).astype(x.dtype)


class Linear(nnx.Module):
    """y = x @ weight (+ lora), for one or several projections of the same input, side by side in one matrix.

    parts: {projection name: output dim}. Calling it returns [..., sum of the output dims].
    """

    def __init__(self, in_dim: int, parts: dict[str, int]):
        self.in_dim, self.parts = in_dim, tuple(parts.items())
        self.weight = nnx.Param(jnp.zeros((in_dim, sum(parts.values())), jnp.float32))
        self.lora: LoraSlot | None = nnx.data(None)

    def __call__(self, x, dropout_key=None):
        y = matmul(x, self.weight.get_value())
        return y if self.lora is None else y + self.lora(x, dropout_key)


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., 2023) with rotary positions."""

    def __init__(self, config: LlamaConfig):
        n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
        self.heads = (n, k, h)
        self.qkv_proj = Linear(config.embed_dim, {"q_proj": n * h, "k_proj": k * h, "v_proj": k * h})
        self.o_proj = Linear(n * h, {"o_proj": config.embed_dim})
        self.prefix: PrefixSlot | None = nnx.data(None)

    def __call__(self, x, rope, positions, cache, dropout_key):
        """x [B, T, D] -> [B, T, D] and the cache's (keys, values), updated; cache is None or as of `attend_cached`."""
        n, _, h = self.heads
        qkv = self.qkv_proj(x, dropout_key)
        if cache is None:
            q, key, value = self._heads(qkv, rope)
            prefix = None if self.prefix is None else self.prefix(x.dtype)
            out = attend(q, key, value, prefix=prefix).reshape(*x.shape[:-1], n * h)  # [B, T, N H]
        else:
            out, key, value = self.attend_cached(qkv, rope, positions, cache)
        return self.o_proj(out, dropout_key), (key, value)

    def _heads(self, qkv, rope):
        """[B, T, (N + 2 K) H] -> queries [B, T, N, H] and keys [B, T, K, H], rotated, and values [B, T, K, H]."""
        n, k, h = self.heads
        qkv = qkv.reshape(*qkv.shape[:-1], n + 2 * k, h)  # [B, T, N + 2K, H]
        q_key, value = jnp.split(qkv, [n + k], axis=-2)
        return *jnp.split(apply_rope(q_key, *rope), [n], axis=-2), value

    def attend_cached(self, qkv, rope, positions, cache):
        """qkv [B, T, (N + 2 K) H] at slots positions [B, T] -> [B, T, N H], and the cache's (keys, values), updated.

        cache: (keys, values) of this layer, or (keys, values, layer) of all, [B, L, K, S, H], layer int32 [].
        """
        *cache, layer = cache if len(cache) == 3 else (*cache, None)
        q, *new = self._heads(qkv, rope)
        key, value = (write(c, x, positions, layer) for c, x in zip(cache, new))
        if layer is not None and q.shape[1] == 1 and key.dtype == jnp.float32:
            out = attend_layer(q[:, 0], layer, positions[:, 0], key, value)
        else:
            out = attend_cached(q, of_layer(key, layer), of_layer(value, layer), positions)
        return out.reshape(*qkv.shape[:-1], -1), key, value

    def step(self, x: Unfinished, eps: float, rope, positions, cache):
        """`attend_cached` of the product with x [B, D], of one token a row and 4-bit weights: fused on CUDA.

        x is a norm with this eps. Returns [B, N H], the cache's keys and values, and zeros (`matmul_attend`).
        """

        def attend_one(qkv, cos, sin, keys, values, positions):
            rope = cos[:, None], sin[:, None]
            out, keys, values = self.attend_cached(qkv[:, None], rope, positions[:, None], (keys, values))
            return out[:, 0], keys, values

        b = x.x.shape[0]
        cos, sin = (jnp.broadcast_to(table, (b, *table.shape[1:]))[:, 0] for table in rope)  # [B, H/2]
        linear, (keys, values) = self.qkv_proj, cache
        delta = None if linear.lora is None else linear.lora(finish(x, eps)[:, None], None)[:, 0]
        weight = linear.weight.get_value()
        return matmul_attend(x, weight, delta, cos, sin, keys, values, positions[:, 0], eps, attend_one)


class Mlp(nnx.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate(x)) * up(x)).

    In cached decoding it is one fused product of gate and up. Training takes the products apart: the fused one would
    make them again in the backward pass, and keep float32 activations where it is not fused.
    """

    def __init__(self, config: LlamaConfig):
        self.gate_up_proj = Linear(config.embed_dim, {"gate_proj": config.hidden_dim, "up_proj": config.hidden_dim})
        self.down_proj = Linear(config.hidden_dim, {"down_proj": config.embed_dim})

    def __call__(self, x, dropout_key, *, decoding=False):
        return self.down_proj(self.activations(x, dropout_key, decoding=decoding), dropout_key)

    def activations(self, x, dropout_key, *, decoding):
        """x [B, T, D] -> [B, T, F], what down_proj takes."""
        if decoding and self.gate_up_proj.lora is None:
            return matmul_swiglu(x, self.gate_up_proj.weight.get_value())
        return _gated(self.gate_up_proj(x, dropout_key))


@jax.checkpoint
def _gated(gate_up):
    """gate_up [B, T, 2 F] -> silu(gate) * up [B, T, F]. Only gate_up is kept for the backward pass, not its halves, the
    sigmoid and their products too: 47 of 364 MB for a step of SmolLM2."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


class Block(nnx.Module):
    """One layer. is_cut: heads and hidden units are those of one device of the model axis (tensor_parallel.py)."""

    def __init__(self, config: LlamaConfig):
        self.is_cut = False
        self.input_layernorm = RMSNorm(config.embed_dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.attn_adapter: AdapterSlot | None = nnx.data(None)
        self.post_attention_layernorm = RMSNorm(config.embed_dim, config.norm_eps)
        self.mlp = Mlp(config)
        self.mlp_adapter: AdapterSlot | None = nnx.data(None)

    def __call__(self, h, rope, positions, cache, dropout_key):
        enter, leave = (enter_cut, leave_cut) if self.is_cut else (_as_it_is, _as_it_is)
        out, kv = self.self_attn(enter(self.input_layernorm(h)), rope, positions, cache, dropout_key)
        out = leave(out)
        h = h + (out if self.attn_adapter is None else self.attn_adapter(out))
        out = leave(self.mlp(enter(self.post_attention_layernorm(h)), dropout_key, decoding=cache is not None))
        return h + (out if self.mlp_adapter is None else self.mlp_adapter(out)), kv

    def has_step(self) -> bool:
        """Whether `step` can serve: the layer is not cut, and its weights have the kernels."""
        return not self.is_cut and decodes_fused(*self.weights())

    def weights(self) -> list:
        """The four matrices, in the order of use."""
        linears = (self.self_attn.qkv_proj, self.self_attn.o_proj, self.mlp.gate_up_proj, self.mlp.down_proj)
        return [linear.weight.get_value() for linear in linears]

    def step(self, h, x: Unfinished, rope, positions, cache, next_norm: RMSNorm):
        """One token a row: h [B, D], x = input_layernorm(h) -> h [B, D] after this layer, next_norm(h), the cache.

        What `__call__` computes, cut where the kernels are: a product, the residual, its sum and its norm are one.
        """
        attn, norm = self.self_attn, self.post_attention_layernorm
        out, key, value, zeros = attn.step(x, self.input_layernorm.eps, rope, positions, cache)
        first_zero = key.shape[0] * key.shape[1]
        gate_up = self.mlp.gate_up_proj
        weight = gate_up.weight.get_value()
        counts = {"first_zero": first_zero, "num_zeros": swiglu_zeros(len(h), weight) if gate_up.lora is None else 0}
        h, x, zeros = _project_norm(attn.o_proj, self.attn_adapter, out, h, norm, zeros, **counts)
        if gate_up.lora is None:
            out, zeros = matmul_swiglu_step(x, weight, norm.eps, zeros)
        else:
            out, zeros = self.mlp.activations(finish(x, norm.eps)[:, None], None, decoding=True)[:, 0], None
        h, x, _ = _project_norm(self.mlp.down_proj, self.mlp_adapter, out, h, next_norm, zeros)
        return h, x, (key, value)


class Embedding(nnx.Module):
    """Token embedding [V, D], or the tied head [D, V] as an Int8Weight. is_cut: of the model axis' device's tokens."""

    def __init__(self, config: LlamaConfig):
        self.is_cut = False
        self.weight = nnx.Param(jnp.zeros((config.vocab_size, config.embed_dim), jnp.float32))

    def __call__(self, tokens):
        weight = self.weight.get_value()
        return look_up_cut(weight, tokens) if self.is_cut else look_up(weight, tokens)


class Llama(nnx.Module):
    """The language model. head_is_cut: the head is that of the model axis' device's tokens."""

    def __init__(self, config: LlamaConfig):
        self.head_is_cut = False
        self.config = config
        self.embed_tokens = Embedding(config)
        self.layers = nnx.List([Block(config) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.embed_dim, config.norm_eps)
        self.lm_head = nnx.data(
            None if config.tie_embeddings else Linear(config.embed_dim, {"lm_head": config.vocab_size})
        )
        self.soft_prompt: PromptSlot | None = nnx.data(None)

    def hidden(self, tokens, *, dropout_key=None, remat=False):
        """tokens int32 [B, T] -> final hidden states [B, T, D], causal. remat recomputes each block in the backward
        pass, so that only one block's activations are held."""
        h = self.through(self.embedded(tokens), 0, len(self.layers), dropout_key=dropout_key, remat=remat)
        if self.soft_prompt is not None:
            h = h[:, h.shape[1] - tokens.shape[1] :]  # [B, T, D]: the prompt's own outputs are not predictions
        return self.norm(h)

    def through(self, h, first: int, end: int, *, dropout_key=None, remat=False):
        """h [B, T, D] after layers first .. end - 1, causal."""
        positions = jnp.arange(self._first_position(), self._first_position() + h.shape[1], dtype=jnp.int32)
        rope = self._rope(positions[None])
        run = _run_block_remat if remat else _run_block
        for i in range(first, end):
            h = run(self.layers[i], h, rope, dropout_key)
        return h

    def hidden_cached(self, tokens, positions, cache: KVCache):
        """As `hidden`, for tokens at absolute slots positions int32 [B, T], reading and writing the cache."""
        h = self.embed_tokens(tokens).astype(self.config.dtype)
        return self._blocks_cached(h, positions, cache)

    def _blocks_cached(self, h, positions, cache: KVCache):
        rope = self._rope(positions)
        if cache.is_one_array:
            return self._blocks_looped(h, rope, positions, cache)
        if h.shape[1] == 1 and all(block.has_step() for block in self.layers):
            return self._blocks_step(h[:, 0], rope, positions, cache)
        keys, values = [], []
        for i, block in enumerate(self.layers):
            h, (key, value) = block(h, rope, positions, (cache.keys[i], cache.values[i]), None)
            keys.append(key)
            values.append(value)
        return self.norm(h), KVCache(tuple(keys), tuple(values))

    def _blocks_looped(self, h, rope, positions, cache: KVCache):
        joined = layer_loop.join(self.layers)

        def run(layer, carried):
            h, cache = carried
            h, cache = layer_loop.block_at(joined, layer)(h, rope, positions, (*cache, layer), None)
            return h, KVCache(*cache)

        h, cache = jax.lax.fori_loop(0, len(self.layers), run, (h, cache))
        return self.norm(h), cache

    def _blocks_step(self, h, rope, positions, cache: KVCache):
        keys, values = [], []
        norms = [*(block.input_layernorm for block in self.layers), self.norm]
        x = finished(norms[0](h), norms[0].eps)
        for i, block in enumerate(self.layers):
            h, x, (key, value) = block.step(h, x, rope, positions, (cache.keys[i], cache.values[i]), norms[i + 1])
            keys.append(key)
            values.append(value)
        return finish(x, self.norm.eps)[:, None], KVCache(tuple(keys), tuple(values))

    def start_cache(self, cache: KVCache):
        """Writes what tuned prompts put before the first token (prefix or soft prompt) to slots 0 .. P-1.

        Returns the cache and P, the slot of the first token.
        """
        b = jax.tree.leaves(cache)[0].shape[0]
        if self.soft_prompt is not None:
            prompt = self.soft_prompt(jnp.dtype(self.config.dtype))
            p = prompt.shape[0]
            h = jnp.broadcast_to(prompt[None], (b, *prompt.shape))
            positions = jnp.broadcast_to(jnp.arange(p, dtype=jnp.int32)[None], (b, p))
            return self._blocks_cached(h, positions, cache)[1], p
        if self.layers[0].self_attn.prefix is not None:
            dtype = jnp.dtype(self.config.dtype)
            prefixes: Any = [block.self_attn.prefix for block in self.layers]  # all layers have one, or none has
            prefix = KVCache(*zip(*(prefix(dtype) for prefix in prefixes)))  # [P, K, H] of each layer
            if cache.is_one_array:
                prefix = KVCache(*map(jnp.stack, prefix))
            return jax.tree.map(write_prefix, cache, prefix), self._first_position()
        return cache, 0

    def has_loop(self) -> bool:
        """Whether a loop over layers serves for decoding, and a cache of one array with it: once prepared, all layers
        are alike, and their weights have the kernels."""
        weights = [weight for block in self.layers for weight in block.weights()]
        return decodes_looped(*weights) and layer_loop.are_alike(self.layers)

    def prepare_decoding(self):
        """Does once what every step of decoding would do again to tuned parameters: LoRA's factors are joined, and all
        are cast to the compute dtype."""
        dtype = jnp.dtype(self.config.dtype)
        for block in self.layers:
            attn, mlp = block.self_attn, block.mlp
            for linear in (attn.qkv_proj, attn.o_proj, mlp.gate_up_proj, mlp.down_proj):
                if linear.lora is not None:
                    linear.lora = linear.lora.prepared(dtype)
            if block.attn_adapter is not None:
                block.attn_adapter = block.attn_adapter.prepared(dtype)
            if block.mlp_adapter is not None:
                block.mlp_adapter = block.mlp_adapter.prepared(dtype)

    def logits(self, hidden):
        """hidden [..., D] -> float32 [..., V]."""
        if self.head_is_cut:
            return gather_cut(head_logits(enter_cut(hidden), *self.head()))
        return head_logits(hidden, *self.head())

    def head(self):
        """The head's weight and whether it is turned: [V, D] if so, else [D, V], perhaps packed."""
        if self.lm_head is not None:
            return self.lm_head.weight.get_value(), False
        embedding = self.embed_tokens.weight.get_value()
        return embedding, not isinstance(embedding, Int8Weight)

    def __call__(self, tokens, *, dropout_key=None):
        """tokens int32 [B, T] -> logits float32 [B, T, V]."""
        return self.logits(self.hidden(tokens, dropout_key=dropout_key))

    def embedded(self, tokens):
        """tokens int32 [B, T] -> [B, P + T, D], what the first layer sees; P is a soft prompt's, else 0."""
        h = self.embed_tokens(tokens).astype(self.config.dtype)
        if self.soft_prompt is None:
            return h
        prompt = self.soft_prompt(h.dtype)
        prompt = jnp.broadcast_to(prompt[None], (h.shape[0], *prompt.shape))
        return jnp.concatenate([prompt, h], axis=1)  # [B, P + T, D]

    @property
    def num_prompt_slots(self) -> int:
        """Cache slots that a soft prompt or a prefix takes before the first token."""
        return self._first_position() if self.soft_prompt is None else self.soft_prompt.num_tokens

    def _first_position(self) -> int:
        """Tokens follow a prefix's P slots, as PEFT's past_key_values have it."""
        prefix = self.layers[0].self_attn.prefix
        return 0 if prefix is None else prefix.num_tokens

    def _rope(self, positions):
        c = self.config
        return rope_tables(positions, rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))


Merge = Callable[[dict, dict], Llama]
"""(trainable, frozen) -> the model, free of side effects; see peft/split.py."""


def head_logits(hidden, weight, tied: bool):
    """hidden [..., D] -> float32 [..., V], by the weight that `Llama.head` gives."""
    if tied:
        return turned_product(hidden, weight.astype(hidden.dtype))
    return matmul(hidden, weight).astype(jnp.float32)


def _as_it_is(x):
    return x


def _project_norm(
    linear: Linear, adapter: AdapterSlot | None, x, residual, norm: RMSNorm, zeros, *, first_zero=0, num_zeros=0
):
    """h = residual + adapter(linear(x)), 4-bit, and norm(h); x [B, D], residual [B, F], adapter None for none.

    zeros, first_zero, num_zeros and what is returned: as of `matmul_norm`.
    """
    norm_weight = norm.weight.get_value()
    if adapter is not None:
        out = adapter(linear(x[:, None]))[:, 0]
        return add_norm(out, residual, norm_weight, norm.eps, norm.normalized, num_zeros)
    if linear.lora is not None:
        residual = residual + linear.lora(x[:, None], None)[:, 0]
    weight, of_zeros = linear.weight.get_value(), {"first_zero": first_zero, "num_zeros": num_zeros}
    return matmul_norm(x, weight, residual, norm_weight, norm.eps, norm.normalized, zeros, **of_zeros)


def _run_block(block, h, rope, dropout_key):
    return block(h, rope, None, None, dropout_key)[0]


def _run_block_remat(block, h, rope, dropout_key):
    graphdef, state = nnx.split(block)
    run = jax.checkpoint(lambda state, h: _run_block(nnx.merge(graphdef, state), h, rope, dropout_key))
    return run(state, h)


def _broadcast(v, ndim):
    return v.reshape((1,) * (ndim - 1) + v.shape)


def abstract_llama(config: LlamaConfig) -> Llama:
    """A Llama whose parameters are shapes only (jax.ShapeDtypeStruct): no memory is taken."""
    return nnx.eval_shape(lambda: Llama(config))
