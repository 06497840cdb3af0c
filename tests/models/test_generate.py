"""Generation: cached decoding against full passes for every tuning, unequal lengths, sampling, stopping, llama2.c."""

import dataclasses
import functools
import itertools
import os
import pathlib
import subprocess
import sys

import gguf
import gguf.quants
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.config import llama_preset
from fmfl_jax.models.generate import NO_TOKEN, Sampling, generate, has_loop, in_nucleus, sample
from fmfl_jax.models.params import init_params
from fmfl_jax.models.quantize import quantize, quantize_head
from fmfl_jax.peft.adapter import AdapterConfig
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.prompt import PrefixConfig, PromptConfig
from fmfl_jax.peft.split import NoPeftConfig, split
from fmfl_jax.quant.awq import QuantConfig
from fmfl_jax.quant.linear import look_up, matmul, matmul_swiglu
from kernels.w4a16 import api
from kernels.w4a16.cpu import product


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch):
    """As on a machine without JAX's CUDA plugin, which `make test` installs: packed layers are then looped over."""
    monkeypatch.setattr(api, "can_launch", lambda: False)


CONFIG = llama_preset("tiny", num_layers=2, hidden_dim=96, max_seq_len=48, tie_embeddings=False)
TUNINGS = {
    "base": NoPeftConfig(),
    "lora": LoraConfig(targets=("q_proj", "v_proj", "up_proj", "o_proj")),
    "adapter": AdapterConfig(),
    "prompt": PromptConfig(num_tokens=3),
    "prefix": PrefixConfig(num_tokens=3),
}
PROMPTS = [[7, 1, 200, 4, 9, 30], [5], [90, 91, 17]]


@functools.cache
def base_params(packed):
    params = jax.tree.map(lambda x: x * 6 if x.ndim == 2 else x, init_params(CONFIG, jax.random.key(0)))
    if packed:
        rtn = QuantConfig(method="rtn", group_size=32)
        _, params = quantize_head(CONFIG, quantize(CONFIG, params, None, rtn), bits=4, group_size=32)
    return params


def tuned(name, packed=False):
    """(model split, its trainable parameters at random values)."""
    s = split(CONFIG, base_params(packed), TUNINGS[name], key=jax.random.key(1))
    keys = jax.random.split(jax.random.key(2), len(s.trainable) + 1)
    return s, {n: 0.2 * jax.random.normal(k, x.shape, x.dtype) for k, (n, x) in zip(keys, sorted(s.trainable.items()))}


def generated(s, trainable, prompts, **kwargs):
    options = dict(max_new_tokens=9, sampling=Sampling(), key=jax.random.key(0), chunk=4) | kwargs
    return np.concatenate(list(generate(CONFIG, s.merge, trainable, s.frozen, prompts, **options)), axis=1)


@functools.cache
def greedy(name, packed):
    """What follows PROMPTS, int [3, 9]."""
    return generated(*tuned(name, packed), PROMPTS)


@pytest.mark.parametrize("name, packed", list(itertools.product(TUNINGS, (False, True))))
def test_greedy_equals_full_passes(name, packed):
    """A batch of prompts of unequal lengths; each row's tokens are the full pass's best ones, given those before."""
    s, trainable = tuned(name, packed)
    out = greedy(name, packed)
    assert out.shape == (3, 9) and len(np.unique(out)) > 3
    rows = [prompt + list(map(int, new)) for prompt, new in zip(PROMPTS, out)]
    padded = np.zeros((3, max(map(len, rows))), np.int32)
    for line, row in zip(padded, rows):
        line[: len(row)] = row
    logits = np.asarray(jax.jit(lambda t, f: s.merge(t, f)(padded))(trainable, s.frozen))
    for row, prompt, ours in zip(logits, PROMPTS, out):
        places = row[len(prompt) - 1 : len(prompt) - 1 + len(ours)]
        chosen = np.take_along_axis(places, ours[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(chosen, places.max(axis=1), atol=2e-4)
        assert np.ptp(places, axis=1).min() > 1  # far from a tie of everything


@pytest.mark.skipif(not product.available(), reason="no compiler, or no kernels for this CPU")
def test_alike_packed_layers_are_looped_over(monkeypatch):
    loops = lambda s: has_loop(s.merge, s.trainable, s.frozen)
    for name in TUNINGS:
        assert loops(tuned(name, True)[0])
        assert not loops(tuned(name)[0])  # a loop would copy its weights
    one_layer = LoraConfig(targets=("layers.0.self_attn.q_proj",))
    assert not loops(split(CONFIG, base_params(True), one_layer, key=jax.random.key(1)))
    monkeypatch.setattr(api, "can_launch", lambda: True)
    assert not loops(tuned("base", True)[0])  # what is traced may be lowered for CUDA


def test_tuned_parameters_matter_in_decoding():
    outs = {name: greedy(name, False).tobytes() for name in TUNINGS}
    assert len(set(outs.values())) == len(TUNINGS)


def test_chunks_and_the_rest_of_the_batch_change_nothing():
    s, trainable = tuned("lora")
    np.testing.assert_array_equal(greedy("lora", False)[1:2], generated(s, trainable, PROMPTS[1:2], chunk=9))


def test_stop_tokens_end_their_row_only():
    s, trainable = tuned("base")
    free = greedy("base", False)
    stop = int(free[0, 3])
    ended = generated(s, trainable, PROMPTS, sampling=Sampling(stop_tokens=(stop, 999)))
    for row, expected in zip(ended, free):
        where = np.flatnonzero(expected == stop)
        end = where[0] + 1 if len(where) else len(row)  # the stop token itself is returned
        np.testing.assert_array_equal(row[:end], expected[:end])
        assert (row[end:] == NO_TOKEN).all()
    alone = list(
        generate(
            CONFIG,
            s.merge,
            trainable,
            s.frozen,
            PROMPTS[:1],
            max_new_tokens=40,
            chunk=4,
            sampling=Sampling(stop_tokens=(int(free[0, 0]),)),
            key=jax.random.key(0),
        )
    )
    assert [chunk.shape for chunk in alone] == [(1, 1)]  # nothing is decoded after the only row's end


LOGITS = np.log(np.array([0.5, 0.2, 0.15, 0.1, 0.05], np.float32))


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(temperature=1.0), [0.5, 0.2, 0.15, 0.1, 0.05]),
        (Sampling(temperature=0.5), np.array([25, 4, 2.25, 1, 0.25]) / 32.5),
        (Sampling(temperature=1.0, top_k=2), [5 / 7, 2 / 7, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=99), [0.5, 0.2, 0.15, 0.1, 0.05]),
        (Sampling(temperature=1.0, top_p=0.6), [5 / 7, 2 / 7, 0, 0, 0]),  # 0.5 is less than 0.6: the second is kept too
        (Sampling(temperature=1.0, top_p=0.4), [1, 0, 0, 0, 0]),
        (
            Sampling(temperature=1.0, top_k=3, top_p=0.7),
            [5 / 7, 2 / 7, 0, 0, 0],
        ),  # top_p of what top_k left: 0.59, 0.24
        (Sampling(temperature=0.0), [1, 0, 0, 0, 0]),
        # The tokenizer lacks the two likeliest ids, which the embedding has.
        (Sampling(temperature=1.0, vocab_size=3), [0, 0, 0.5, 1 / 3, 1 / 6]),
        (Sampling(temperature=1.0, top_k=2, vocab_size=3), [0, 0, 0.6, 0.4, 0]),
        (Sampling(temperature=1.0, top_p=0.4, vocab_size=3), [0, 0, 1, 0, 0]),
        (Sampling(temperature=0.0, vocab_size=3), [0, 0, 1, 0, 0]),
    ],
)
def test_sampling_distribution(sampling, expected):
    draws = 20000
    order = np.random.default_rng(0).permutation(5)
    if sampling.vocab_size is not None:
        order = np.array([4, 2, 3, 1, 0])  # the likeliest two last
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[order])[None], (draws, 5))
    counts = np.bincount(np.asarray(sample(logits, jax.random.key(0), sampling)), minlength=5)[np.argsort(order)]
    expected = np.asarray(expected, float)
    assert (counts[expected == 0] == 0).all()
    np.testing.assert_allclose(counts / draws, expected, atol=4.5 * (0.25 / draws) ** 0.5)


def test_the_nucleus_is_what_sorting_keeps():
    """Tokens before which, in falling order, less than top_p is; on peaked, flat and tied rows."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, 300)) * np.geomspace(1e-3, 30, 40)[:, None]
    logits[::5] = np.round(logits[::5])  # ties
    found = np.asarray(jax.jit(lambda x: in_nucleus(x, 0.9))(jnp.asarray(logits, jnp.float32)))
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    above = np.asarray([[row[row > p].sum() for p in row] for row in probs])
    clear = np.abs(above - 0.9) > 1e-4  # rounding decides the others
    assert 0 < found.mean() < 1 and clear.mean() > 0.99
    np.testing.assert_array_equal(found[clear], (above < 0.9)[clear])


def test_draws_follow_the_key():
    s, trainable = tuned("base")
    hot = dict(sampling=Sampling(temperature=1.5, top_k=50), max_new_tokens=5)
    first, again, other = (generated(s, trainable, PROMPTS, **hot, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    "prompts, new, message",
    [
        ([[1], []], 4, "at least one token"),
        ([[1] * 40], 9, "40 prompt tokens [+] 9 new ones [+] 0 tuned ones exceed"),
    ],
)
def test_refusals(prompts, new, message):
    s, trainable = tuned("base")
    with pytest.raises(ValueError, match=message):
        generated(s, trainable, prompts, max_new_tokens=new)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=-1.0), "temperature"),
        (dict(top_k=0), "top_k"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.5), "top_p"),
        (dict(vocab_size=0), "vocab_size"),
    ],
)
def test_bad_sampling(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_swiglu_of_arrays_and_packed_weights():
    """One call for gate, up and the activation equals the three, on the reference path."""
    x = jax.random.normal(jax.random.key(0), (3, CONFIG.embed_dim), jnp.float32)
    for packed in (False, True):
        weight = base_params(packed)["layers.0.mlp.gate_up_proj.weight"]
        gate, up = jnp.split(matmul(x, weight), 2, axis=-1)
        np.testing.assert_allclose(matmul_swiglu(x, weight), jax.nn.silu(gate) * up, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_tied_head_gets_a_packed_copy(bits):
    """The logits are those of an untied model whose head is the embedding, rounded; 8 bits keep a GGUF one, where
    tokens are looked up."""
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    params = {name: x for name, x in base_params(False).items() if name != "lm_head.weight"}
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    stored = gguf.quants.quantize(np.asarray(params["embed_tokens.weight"]), q8_0)
    params["embed_tokens.weight"] = jnp.asarray(gguf.quants.dequantize(stored, q8_0))
    config, packed = quantize_head(tied, params, bits=bits, group_size=32)
    head = packed["lm_head.weight"].dequantize() if bits == 4 else params["embed_tokens.weight"].T
    rounded = params | {"lm_head.weight": head}
    untied = dataclasses.replace(CONFIG, tie_embeddings=False)
    tokens = jnp.asarray([PROMPTS[0]], jnp.int32)
    logits = [split(c, p, NoPeftConfig(), key=jax.random.key(0)) for c, p in ((config, packed), (untied, rounded))]
    got, expected = (jax.jit(lambda t, f, m=m: m.merge(t, f)(tokens))(m.trainable, m.frozen) for m in logits)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    if bits == 8:
        assert config.tie_embeddings and "lm_head.weight" not in packed
        np.testing.assert_array_equal(
            look_up(packed["embed_tokens.weight"], tokens), params["embed_tokens.weight"][tokens]
        )
    else:
        assert packed["embed_tokens.weight"] is params["embed_tokens.weight"]


def test_llama2c_published_text(shared_data):
    """Character by character, through the command."""
    folder = shared_data / "ckpt" / "stories260K"
    command = [
        sys.executable,
        "-m",
        "launch.generate",
        f"--checkpoint={folder / 'stories260K.bin'}",
        f"--tokenizer={folder / 'tok512.bin'}",
        "--temperature=0",
        "--max_new_tokens=200",
    ]
    done = subprocess.run(
        command,
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        timeout=300,
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == (folder / "expected_greedy_200.txt").read_bytes() + b"\n"
