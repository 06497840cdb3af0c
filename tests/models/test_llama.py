"""The model itself: causality, the KV cache against the full pass, recomputation, the loss, the parameters' names."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.config import RopeScaling, llama_preset
from fmfl_jax.models.kv_cache import KVCache
from fmfl_jax.models.loss import token_nll
from fmfl_jax.models.params import init_params, num_bytes, param_specs, projections
from fmfl_jax.models.rope import apply_rope, rope_frequencies, rope_tables
from fmfl_jax.peft.prompt import PrefixConfig, PromptConfig
from fmfl_jax.peft.split import NoPeftConfig, split

CONFIG = llama_preset("tiny", rope_theta=500.0, max_seq_len=32, hidden_dim=96)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12)).astype(np.int32)


@functools.cache
def base_params():
    # Far from the small initial weights, so that attention is not uniform.
    return jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, init_params(CONFIG, jax.random.key(0)))


def model_of(peft=NoPeftConfig()):
    s = split(CONFIG, base_params(), peft, key=jax.random.key(1))
    return s.merge(jax.tree.map(lambda x: 10 * x, s.trainable), s.frozen)


def test_causal():
    run = jax.jit(model_of())
    full = run(TOKENS)
    changed = TOKENS.copy()
    changed[:, 7] += 1
    other = run(changed)
    np.testing.assert_array_equal(full[:, :7], other[:, :7])
    assert np.abs(full[:, 7:] - other[:, 7:]).min(axis=-1).max() > 0


@pytest.mark.parametrize("peft", [NoPeftConfig(), PrefixConfig(num_tokens=3), PromptConfig(num_tokens=3)])
def test_cached_decoding_equals_the_full_pass(peft):
    """Five tokens at once, then one by one, each batch row from the same slots."""
    model = model_of(peft)
    expected = jax.jit(model)(TOKENS)
    shape = (2, CONFIG.num_kv_heads, CONFIG.max_seq_len, CONFIG.head_dim)
    empty = tuple(jnp.full(shape, 99.0, jnp.float32) for _ in range(CONFIG.num_layers))  # unwritten slots are not seen
    cache = jax.jit(lambda cache: model.start_cache(cache)[0])(KVCache(empty, empty))
    first = getattr(peft, "num_tokens", 0)

    @jax.jit
    def step(tokens, positions, cache):
        hidden, cache = model.hidden_cached(tokens, positions, cache)
        return model.logits(hidden), cache

    got = []
    for start, stop in [(0, 5), *((t, t + 1) for t in range(5, TOKENS.shape[1]))]:
        positions = np.broadcast_to(np.arange(first + start, first + stop, dtype=np.int32), (2, stop - start))
        logits, cache = step(TOKENS[:, start:stop], positions, cache)
        got.append(logits)
    np.testing.assert_allclose(np.concatenate(got, axis=1), expected, rtol=0, atol=1e-4)


def test_remat_changes_no_value_and_no_gradient():
    s = split(CONFIG, base_params(), PrefixConfig(num_tokens=2), key=jax.random.key(1))

    def loss(trainable, remat):
        return token_nll(s.merge(trainable, s.frozen), TOKENS, remat=remat).mean()

    plain, remat = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(s.trainable, flag) for flag in (False, True))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), plain, remat)


def test_loss_is_the_mean_surprise():
    model = model_of()
    log_p = np.asarray(jax.nn.log_softmax(jax.jit(model)(TOKENS[:, :-1]), axis=-1))
    expected = [[-log_p[b, t, TOKENS[b, t + 1]] for t in range(TOKENS.shape[1] - 1)] for b in range(2)]
    np.testing.assert_allclose(jax.jit(lambda: token_nll(model, TOKENS))(), np.asarray(expected), rtol=1e-5)


def test_rope_depends_on_the_distance_alone():
    freq = rope_frequencies(16, 100.0, None)
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 16), jnp.float32) for i in range(2))

    def score(m, n):
        tables = (rope_tables(jnp.array([[p]], jnp.int32), freq) for p in (m, n))
        return float(jnp.sum(apply_rope(q, *next(tables)) * apply_rope(k, *next(tables))))

    assert abs(score(3, 10) - score(203, 210)) < 1e-4
    assert abs(score(3, 10) - score(3, 11)) > 1e-3


def test_llama3_frequencies_in_their_three_regimes():
    plain = rope_frequencies(128, 5e5, None).astype(np.float64)
    scaled = rope_frequencies(128, 5e5, RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=8192))
    turns = 8192 * plain / (2 * math.pi)
    np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    smooth = (turns[between] - 1) / 3
    assert between.sum() > 3
    np.testing.assert_allclose(scaled[between], (1 - smooth) * plain[between] / 8 + smooth * plain[between], rtol=1e-6)


def test_parameter_counts_of_the_presets():
    """The published sizes: 6.74, 8.03, 13.0 and 69.0 billion (Touvron et al., 2023b; Grattafiori et al., 2024)."""
    counts = {
        name: sum(math.prod(spec.shape) for spec in param_specs(llama_preset(name)).values())
        for name in ("7b", "8b", "13b", "70b")
    }
    assert counts == {"7b": 6738415616, "8b": 8030261248, "13b": 13015864320, "70b": 68976648192}


def test_projections_cover_the_matrices():
    specs = param_specs(CONFIG)
    columns = {}
    for p in projections(CONFIG).values():
        assert specs[f"{p.matrix}.weight"].shape[0] == p.in_dim
        columns.setdefault(p.matrix, []).extend(range(p.columns.start, p.columns.stop))
    for matrix, covered in columns.items():
        assert covered == list(range(specs[f"{matrix}.weight"].shape[1]))
    matrices = {name for name, spec in specs.items() if name.startswith("layers.") and len(spec.shape) == 2}
    assert {f"{matrix}.weight" for matrix in columns} == matrices


def test_init_is_in_the_dtype_asked_for():
    params = init_params(CONFIG, jax.random.key(0), dtype="bfloat16")
    assert {name: x.shape for name, x in params.items()} == {n: s.shape for n, s in param_specs(CONFIG).items()}
    assert all(x.dtype == (jnp.float32 if x.ndim == 1 else jnp.bfloat16) for x in params.values())
    assert num_bytes(params) == sum(x.size * (4 if x.ndim == 1 else 2) for x in params.values())
    std = float(jnp.std(params["layers.0.mlp.down_proj.weight"].astype(jnp.float32)))
    assert abs(std - 0.02 / math.sqrt(2 * CONFIG.num_layers)) < 5e-4
