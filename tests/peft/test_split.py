"""The tunings themselves: step 0, what is trained, merging, dropout, and targets that match nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.config import llama_preset
from fmfl_jax.models.loss import token_nll
from fmfl_jax.models.params import init_params, param_specs
from fmfl_jax.peft.adapter import AdapterConfig
from fmfl_jax.peft.lora import LoraConfig, lora_targets, merge_lora
from fmfl_jax.peft.prompt import PrefixConfig, PromptConfig
from fmfl_jax.peft.split import FullConfig, NoPeftConfig, split
from fmfl_jax.quant.int4 import Int4Weight
from tests.golden.weights import draw

CONFIG = llama_preset("tiny", num_layers=1)
TWO_LAYERS = llama_preset("tiny")
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 9)).astype(np.int32)


@functools.cache
def params():
    return jax.tree.map(lambda x: x * 5 if x.ndim == 2 else x, init_params(CONFIG, jax.random.key(0)))


def make(tuning):
    return split(CONFIG, params(), tuning, key=jax.random.key(1))


def run(s, trainable=None):
    """Logits of TOKENS."""
    return jax.jit(lambda trainable, frozen: s.merge(trainable, frozen)(TOKENS))(
        s.trainable if trainable is None else trainable, s.frozen
    )


@functools.cache
def base_logits():
    return np.asarray(run(make(NoPeftConfig())))


def randomized(s):
    return {name: jnp.asarray(draw(name, x.shape, 0.1)) for name, x in s.trainable.items()}


@pytest.mark.parametrize("tuning", [LoraConfig(targets=("v_proj", "gate_proj")), AdapterConfig(), FullConfig()])
def test_step_zero_is_the_base_exactly(tuning):
    np.testing.assert_array_equal(base_logits(), run(make(tuning)))


@pytest.mark.parametrize("start", [[7, 200, 7, 31, 90, 5], [250, 3]])
def test_a_prompt_from_a_text_starts_as_that_text_before_the_tokens(start):
    """The first P tokens of the text, or all of them again and again, before any training."""
    start, p = np.asarray(start), 5
    s = split(CONFIG, params(), PromptConfig(num_tokens=p), key=jax.random.key(1), prompt_start=start)
    before = np.tile(start, p)[:p].astype(np.int32)
    base = make(NoPeftConfig())
    whole = base.merge({}, base.frozen)(np.concatenate([np.tile(before, (len(TOKENS), 1)), TOKENS], axis=1))
    np.testing.assert_allclose(run(s), whole[:, p:], rtol=0, atol=1e-4)
    assert np.abs(whole[:, p:] - base_logits()).max() > 0.05


@pytest.mark.parametrize("tuning", [LoraConfig(targets=("*",)), AdapterConfig(), PromptConfig(), PrefixConfig()])
def test_every_trainable_parameter_gets_a_gradient(tuning):
    """At random values; and the frozen ones are the base's, untouched."""
    s = make(tuning)
    grads = jax.jit(jax.grad(lambda t: token_nll(s.merge(t, s.frozen), TOKENS).mean()))(randomized(s))
    assert set(grads) == set(s.trainable) and grads
    for name, grad in grads.items():
        assert float(jnp.abs(grad).max()) > 0, name
    assert all(x.dtype == jnp.float32 for x in s.trainable.values())
    assert all(s.frozen[name] is params()[name] for name in params()) and set(s.frozen) == set(params())


def test_full_fine_tuning_trains_everything_and_refuses_packed_weights():
    s = make(FullConfig())
    assert set(s.trainable) == set(param_specs(CONFIG)) and not s.frozen
    name = "layers.0.self_attn.o_proj.weight"
    zeros = np.zeros((2, 64), np.uint8)
    packed = Int4Weight.pack(np.zeros((64, 64), np.uint8), zeros.astype(np.float16), zeros, group_size=32)
    with pytest.raises(ValueError, match=name):
        split(CONFIG, params() | {name: packed}, FullConfig(), key=jax.random.key(0))
    with pytest.raises(ValueError, match="quantized"):
        tuning = LoraConfig(targets=("o_proj",))
        merge_lora(params() | {name: packed}, make(tuning).trainable, CONFIG, tuning)


def test_merged_equals_unmerged():
    """Parts of fused matrices, and a whole one."""
    tuning = LoraConfig(rank=3, alpha=5.0, targets=("k_proj", "up_proj", "layers.0.*.d*"))
    s = make(tuning)
    trainable = randomized(s)
    before = {name: np.asarray(x) for name, x in params().items()}
    merged = merge_lora(params(), trainable, CONFIG, tuning)
    plain = split(CONFIG, merged, NoPeftConfig(), key=jax.random.key(0))
    tuned = run(s, trainable)
    np.testing.assert_allclose(run(plain), tuned, rtol=0, atol=1e-4)
    assert np.abs(tuned - base_logits()).max() > 0.05
    for name, x in before.items():
        np.testing.assert_array_equal(params()[name], x)


def test_dropout_is_off_in_evaluation_and_unbiased_in_training():
    """The mean over many masks is the evaluation's output, within its standard error."""
    tuning = LoraConfig(rank=4, dropout=0.4, targets=("down_proj", "o_proj"))
    s = make(tuning)
    trainable = randomized(s)
    lora = s.merge(trainable, s.frozen).layers[0].mlp.down_proj.lora
    x = jax.random.normal(jax.random.key(3), (5, CONFIG.hidden_dim), jnp.float32)
    plain = lora(x, None)
    np.testing.assert_array_equal(plain, lora(x, None))
    outs = jax.jit(jax.vmap(lambda key: lora(x, key)))(jax.random.split(jax.random.key(4), 2000))
    error = jnp.abs(outs.mean(axis=0) - plain) / (outs.std(axis=0) / 2000**0.5)
    assert float(error.max()) < 5 and float(outs.std(axis=0).min()) > 0
    other = s.merge(trainable, s.frozen).layers[0].self_attn.o_proj.lora
    assert other.index != lora.index  # each Linear draws a mask of its own


def test_targets():
    assert lora_targets(TWO_LAYERS, ("q_proj",)) == ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]
    assert lora_targets(TWO_LAYERS, ("layers.1.mlp.*",)) == [f"layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert len(lora_targets(TWO_LAYERS, ("*",))) == 14
    for missing in ("q", "query", "layers.7.*", "proj"):
        with pytest.raises(ValueError, match=f"'{missing.replace('*', '.')}' matches no projection"):
            make(LoraConfig(targets=("q_proj", missing)))


@pytest.mark.parametrize(
    "make_config, named",
    [
        (lambda: LoraConfig(rank=0), "rank"),
        (lambda: LoraConfig(dropout=1.0), "dropout"),
        (lambda: LoraConfig(targets=()), "target"),
        (lambda: AdapterConfig(bottleneck_dim=0), "bottleneck_dim"),
        (lambda: PromptConfig(num_tokens=0), "prompt num_tokens"),
        (lambda: PrefixConfig(num_tokens=-1), "prefix num_tokens"),
    ],
)
def test_bad_configurations(make_config, named):
    with pytest.raises(ValueError, match=named):
        make_config()


@pytest.mark.parametrize("tuning", [LoraConfig(), PromptConfig()])
def test_vmap_over_clients_equals_a_loop(tuning):
    """The same base, trainable parameters of three clients at once: what a federated round does."""
    s = make(tuning)
    clients = [jax.tree.map(lambda x: x * (i + 1.0), randomized(s)) for i in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *clients)

    def loss(trainable, tokens):
        return token_nll(s.merge(trainable, s.frozen), tokens).mean()

    tokens = np.stack([TOKENS, TOKENS + 1, TOKENS // 2])
    together, one = jax.jit(jax.vmap(loss))(stacked, tokens), jax.jit(loss)
    apart = np.asarray([one(client, t) for client, t in zip(clients, tokens)])
    assert apart.std() > 1e-3
    np.testing.assert_allclose(together, apart, rtol=1e-5)
