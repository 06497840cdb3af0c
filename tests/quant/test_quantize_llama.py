"""Quantizing a whole LLaMA: folding, what AWQ recovers, memory, and the acceptance on a real checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.config import llama_preset
from fmfl_jax.models.calibration import GATE_UP, INPUT_NORM, MATRICES, NORMS, POST_NORM, QKV
from fmfl_jax.models.params import init_params, is_weight, param_specs
from fmfl_jax.models.quantize import awq_block, fold, quantize, rtn_block, with_group_size
from fmfl_jax.peft.split import NoPeftConfig, split
from fmfl_jax.quant.awq import QuantConfig, channel_scale
from fmfl_jax.quant.rtn import pack_weight, round_weight

CONFIG = llama_preset("tiny", hidden_dim=172)


def logits_of(config, params, tokens):
    model = split(config, params, NoPeftConfig(), key=jax.random.key(0))
    return jax.jit(lambda frozen: model.merge({}, frozen)(tokens))(model.frozen)


def outlier_params(config, seed=0):
    """A model whose activations have outlier channels, as large language models' do (norm weights of 1 to 30)."""
    params = init_params(config, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    for name, value in params.items():
        if name.endswith("layernorm.weight"):
            factor = np.where(rng.random(value.shape) < 0.06, 30.0, 1.0)
            params[name] = jnp.asarray(factor, jnp.float32)
        elif value.ndim == 2:
            params[name] = value * 3
    return params


def tokens_of(config, shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, size=shape), jnp.int32)


@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_folding_leaves_the_function_unchanged(num_kv_heads):
    config = llama_preset("tiny", hidden_dim=172, num_kv_heads=num_kv_heads)
    params, tokens = init_params(config, jax.random.key(0)), tokens_of(config, (2, 24))
    rng, folded = np.random.default_rng(0), dict(params)
    for i in range(config.num_layers):
        block = {name: params[f"layers.{i}.{name}"] for name in MATRICES + NORMS}
        scales = {name: jnp.asarray(np.exp(rng.normal(size=block[name].shape[0])), jnp.float32) for name in MATRICES}
        if num_kv_heads != config.num_heads:
            scales["self_attn.o_proj.weight"] = jnp.ones_like(scales["self_attn.o_proj.weight"])
        folded |= {f"layers.{i}.{name}": value for name, value in fold(block, scales, config).items()}
    assert not np.allclose(folded["layers.1." + QKV], params["layers.1." + QKV], rtol=0.1)
    np.testing.assert_allclose(logits_of(config, folded, tokens), logits_of(config, params, tokens), atol=1e-5)


@pytest.mark.parametrize(("bits", "group_size", "num_kv_heads", "recipe"), [(4, 32, 2, "clip"), (3, -1, 4, "paper")])
def test_awq_recovers_where_activations_have_outliers(bits, group_size, num_kv_heads, recipe):
    config = llama_preset("tiny", hidden_dim=172, num_kv_heads=num_kv_heads)
    params = outlier_params(config)
    wanted = logits_of(config, params, tokens_of(config, (8, 32), seed=1))
    errors = {}
    for method in ("rtn", "awq"):
        quant = QuantConfig(method=method, bits=bits, group_size=group_size, recipe=recipe)
        packed = quantize(config, params, tokens_of(config, (12, 32)), quant)
        errors[method] = float(jnp.mean((logits_of(config, packed, tokens_of(config, (8, 32), seed=1)) - wanted) ** 2))
    assert errors["awq"] < 0.7 * errors["rtn"]


def block_of(config, seed=0):
    """(a block of outlier_params, inputs [4, 32, D])."""
    params = outlier_params(config, seed)
    block = {name: params["layers.1." + name] for name in MATRICES + NORMS}
    return block, jax.random.normal(jax.random.key(seed), (4, 32, config.embed_dim))


def test_the_papers_scale_is_the_best_of_20_for_the_mlps_output():
    """gate and up, with an attention of zero before: the post-norm's division tells the scale that was chosen."""
    block, h = block_of(CONFIG)
    block["self_attn.o_proj.weight"] = jnp.zeros_like(block["self_attn.o_proj.weight"])
    quant = QuantConfig(bits=3, group_size=32, recipe="paper")
    x = block[POST_NORM][None, None] * h / jnp.sqrt(jnp.mean(h * h, axis=-1, keepdims=True) + CONFIG.norm_eps)

    def mlp(gate_up):
        gate, up = jnp.split(x @ gate_up, 2, axis=-1)
        return (jax.nn.silu(gate) * up) @ block["mlp.down_proj.weight"]

    scales = [channel_scale(jnp.mean(jnp.abs(x), axis=(0, 1)), i / 20) for i in range(20)]
    rounded = [round_weight(block[GATE_UP] * s[:, None], bits=3, group_size=32) / s[:, None] for s in scales]
    errors = [float(jnp.mean((mlp(w) - mlp(block[GATE_UP])) ** 2)) for w in rounded]
    out, _ = awq_block(block, jnp.array(h), config=CONFIG, quant=quant)
    found = block[POST_NORM] / out[POST_NORM]
    chosen = int(np.argmin([np.abs(found / s - 1).max() for s in scales]))
    np.testing.assert_allclose(found, scales[chosen], rtol=1e-4)
    assert errors[chosen] <= 1.006 * min(errors) < 0.9 * errors[0]


@pytest.mark.parametrize("recipe", ["paper", "clip"])
def test_the_paper_leaves_q_and_k_unclipped(recipe):
    block, h = block_of(CONFIG)
    quant = QuantConfig(bits=3, group_size=32, recipe=recipe)
    out, _ = awq_block(block, jnp.array(h), config=CONFIG, quant=quant)
    s = block[INPUT_NORM] / out[INPUT_NORM]
    rounded = pack_weight(block[QKV] * s[:, None], bits=3, group_size=32)
    kept = np.isclose(np.asarray(out[QKV].unpack()[1], np.float32), np.asarray(rounded.unpack()[1]), rtol=1e-3)
    qk = (CONFIG.num_heads + CONFIG.num_kv_heads) * CONFIG.head_dim
    assert kept[:, :qk].all() == (recipe == "paper")
    assert not kept[:, qk:].all()


def test_equal_blocks_compile_once():
    config = llama_preset("tiny", hidden_dim=172, num_layers=4)
    before = awq_block._cache_size()
    quantize(config, init_params(config, jax.random.key(0)), tokens_of(config, (12, 32)), QuantConfig(group_size=32))
    assert awq_block._cache_size() == before + 1


def test_what_is_packed_and_what_stays():
    params, seen = init_params(CONFIG, jax.random.key(0)), []
    out = quantize(CONFIG, params, tokens_of(CONFIG, (12, 32)), QuantConfig(group_size=32), on_block=seen.append)
    assert seen == [1, 2]
    assert sorted(out) == sorted(params)
    assert {name for name in out if is_weight(out[name])} == {f"layers.{i}.{m}" for i in range(2) for m in MATRICES}
    np.testing.assert_array_equal(out["embed_tokens.weight"], params["embed_tokens.weight"])
    for name, spec in param_specs(CONFIG).items():
        assert out[name].shape == spec.shape


def test_reads_every_tensor_once():
    """So that a lazy mapping over a file never has more than a block in memory."""

    class Lazy(dict):
        reads = []

        def __getitem__(self, name):
            self.reads.append(name)
            return super().__getitem__(name)

    params = Lazy(init_params(CONFIG, jax.random.key(0)))
    quantize(CONFIG, params, tokens_of(CONFIG, (12, 32)), QuantConfig(group_size=32))
    large = [name for name in params.reads if "norm" not in name]
    assert len(large) == len(set(large)) == len([name for name in params if "norm" not in name])


def test_needs_windows_within_the_vocabulary():
    params = init_params(CONFIG, jax.random.key(0))
    with pytest.raises(ValueError, match="calibration windows"):
        quantize(CONFIG, params, None, QuantConfig())
    with pytest.raises(ValueError, match="vocabulary of 256"):
        quantize(CONFIG, params, np.full((1, 8), 256, np.int32), QuantConfig())
    packed = quantize(CONFIG, params, None, QuantConfig(method="rtn", group_size=32))
    with pytest.raises(ValueError, match="layers.0.self_attn.qkv_proj.weight holds 4-bit integers already"):
        quantize(CONFIG, packed, None, QuantConfig(method="rtn", group_size=32))
    with pytest.raises(ValueError, match="method"):
        QuantConfig(method="nf4")
    with pytest.raises(ValueError, match="recipe must be one of clip, paper, got 'duo'"):
        QuantConfig(recipe="duo")


def test_7b_takes_at_most_3_9_gb():
    """By count, from shapes alone; embedding and head stay in 16 bits."""
    config, quant = llama_preset("7b"), QuantConfig(method="rtn")
    specs = param_specs(config)
    block = {name: jax.ShapeDtypeStruct(specs[f"layers.0.{name}"].shape, jnp.float16) for name in MATRICES + NORMS}
    packed = jax.eval_shape(lambda b: rtn_block(b, quant=quant), block)

    def count(tree):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    per_block = count({name: packed[name] for name in MATRICES}) + 4 * 2 * config.embed_dim
    rest = sum(2 * spec.size for name, spec in specs.items() if not name.startswith("layers."))
    total = config.num_layers * per_block + rest
    assert 3.5e9 < total <= 3.9e9


@pytest.mark.parametrize(
    "dims, size",
    [((576, 9, 1536), 64), ((128, 2, 384), 128), ((64, 1, 192), 64), ((64, 1, 56), 8), ((64, 1, 60), None)],
)
def test_group_size_is_the_largest_that_divides(dims, size):
    embed_dim, heads, hidden_dim = dims
    shape = dict(embed_dim=embed_dim, num_heads=heads, num_kv_heads=heads, head_dim=64, hidden_dim=hidden_dim)
    config, said = llama_preset("tiny", **shape), []
    if size is None:
        with pytest.raises(ValueError, match="no group size of 128, 64, 32, 16, 8 divides.*60: choose --group_size"):
            with_group_size(QuantConfig(group_size=None), config)
        return
    assert with_group_size(QuantConfig(group_size=None), config, said.append).group_size == size
    assert len(said) == (size != 128) and all(f"group size {size}" in line for line in said)
    assert with_group_size(QuantConfig(group_size=32), config, said.append).group_size == 32
