"""The scoring engine and batched generation against one full pass for each text and word."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from fmfl_jax.config import llama_preset
from fmfl_jax.data.tokenizers import byte_tokenizer
from fmfl_jax.models import scoring
from fmfl_jax.models.batch_generate import make_text_generator
from fmfl_jax.models.batching import length_batches, padded_length
from fmfl_jax.models.generate import NO_TOKEN, Sampling, generate
from fmfl_jax.models.params import init_params
from fmfl_jax.models.quantize import quantize
from fmfl_jax.models.scoring import make_engine
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.prompt import PrefixConfig, PromptConfig
from fmfl_jax.peft.split import NoPeftConfig, split
from fmfl_jax.quant.awq import QuantConfig

CONFIG = llama_preset("tiny", num_layers=2, hidden_dim=96, max_seq_len=160, tie_embeddings=False)
TUNINGS = {
    "base": NoPeftConfig(),
    "lora": LoraConfig(targets=("q_proj", "v_proj")),
    "prompt": PromptConfig(num_tokens=3),
    "prefix": PrefixConfig(num_tokens=3),
}
SHOTS = "Rain again. Topic: weather\n\nA late goal. Topic: sports\n\n"
TEXTS = [
    SHOTS + text + " Topic:" for text in ("Snow", "They won the cup at home", "Snow", "x", "A storm near the coast")
]
WORDS = [" weather", " sports", " a", " so"]
TOKENIZER = byte_tokenizer()


@functools.cache
def tuned(name, packed=False):
    params = jax.tree.map(lambda x: x * 4 if x.ndim == 2 else x, init_params(CONFIG, jax.random.key(0)))
    if packed:
        params = quantize(CONFIG, params, None, QuantConfig(method="rtn", group_size=32))
    s = split(CONFIG, params, TUNINGS[name], key=jax.random.key(1))
    keys = jax.random.split(jax.random.key(2), len(s.trainable) + 1)
    return s, {n: 0.3 * jax.random.normal(k, x.shape, x.dtype) for k, (n, x) in zip(keys, sorted(s.trainable.items()))}


def engine(name, packed=False, tokenizer=TOKENIZER, **options):
    s, trainable = tuned(name, packed)
    return make_engine(CONFIG, s.merge, trainable, s.frozen, tokenizer, batch_tokens=128, **options)  # two rows


@functools.cache
def full_pass(name, packed):
    s, trainable = tuned(name, packed)
    run = jax.jit(lambda tokens: jax.nn.log_softmax(s.merge(trainable, s.frozen)(tokens)))
    return lambda ids: np.asarray(run(np.asarray([ids + [0] * (128 - len(ids))], np.int32)))[0]


def one_at_a_time(name, packed, texts, words):
    """[N, W]: the plain loop."""
    out = np.zeros((len(texts), len(words)))
    for n, text in enumerate(texts):
        for w, word in enumerate(words):
            prompt, all_ids = TOKENIZER.encode(text).tolist(), TOKENIZER.encode(text + word).tolist()
            rows = full_pass(name, packed)(all_ids)
            out[n, w] = sum(rows[i - 1, all_ids[i]] for i in range(len(prompt), len(all_ids)))
    return out


@pytest.mark.parametrize("name, packed", [("lora", False), ("prompt", False), ("prefix", True)])
def test_scores_are_those_of_one_text_and_word_at_a_time(name, packed):
    expected = one_at_a_time(name, packed, TEXTS, WORDS)
    assert np.ptp(expected, axis=0).min() > 0.01  # the texts tell
    # On a CPU packed weights take x as 16-bit integers: a sum's order moves a rounding.
    tolerance = dict(atol=5e-3 if packed else 1e-4, rtol=0)
    made = engine(name, packed)
    np.testing.assert_allclose(made.score(TEXTS, WORDS), expected, **tolerance)
    # Later calls take the kept beginning: one text alone, and others that begin in the same way.
    np.testing.assert_allclose(made.score(TEXTS[1:2], WORDS[::-1]), expected[1:2, ::-1], **tolerance)


def test_beginnings_in_common_are_computed_once(monkeypatch):
    passes = []
    block = scoring._block
    monkeypatch.setattr(scoring, "_block", lambda m, c, h, given: passes.append(h.shape) or block(m, c, h, given))
    made = engine("base")
    made.score(TEXTS, WORDS)
    shared = len(SHOTS)
    assert passes[:2] == [(1, shared, CONFIG.embed_dim)] * 2  # once, in both layers
    assert all(shape[1] < shared for shape in passes[2:])
    del passes[:]
    made.score([SHOTS + "Hail Topic:"], WORDS)  # alone, and it need not be computed again
    assert passes == [(1, 16, CONFIG.embed_dim)] * 2


def test_first_tokens_are_the_next_tokens_distribution():
    made = engine("base", whole_words=False)
    first = [TOKENIZER.encode(word)[0] for word in ("w", "s")]
    np.testing.assert_array_equal(made.score(TEXTS, ["w", "s"]), made.next_log_probs(TEXTS)[:, first])
    with pytest.raises(ValueError, match="' weather' and ' sports' begin with the same token: score whole words"):
        made.score(TEXTS, WORDS)


def test_refusals():
    made = engine("prompt")
    with pytest.raises(ValueError, match="text 1 has 160 tokens, the model's context has room for 156"):
        made.score(["a", "b" * 160], [" x"])
    with pytest.raises(ValueError, match="text 0 is empty"):
        made.score([""], ["x"])
    with pytest.raises(ValueError, match="at least one of each"):
        made.score([], ["x"])
    merging = dataclasses.replace(
        TOKENIZER, encode_text=lambda text: [len(part) for part in text.replace("onx", "o\0").split("\0") if part]
    )
    with pytest.raises(ValueError, match="'x' after 'section on' is no token of its own"):
        engine("base", tokenizer=merging).score(["section on"], ["x"])
    s, _ = tuned("base")
    broken = s.frozen | {"norm.weight": s.frozen["norm.weight"].at[3].set(np.nan)}
    with pytest.raises(ValueError, match="NaN or infinity for text 0 .and 4 more"):
        make_engine(CONFIG, s.merge, {}, broken, TOKENIZER, batch_tokens=128).score(TEXTS, WORDS)


def test_batches_are_of_few_shapes_and_hold_every_text_once():
    lengths = np.random.default_rng(0).integers(1, 300, 500)
    batches = list(length_batches(lengths, batch_tokens=1024))
    assert sorted(np.concatenate([b.rows for b in batches])) == list(range(500))
    assert all(lengths[b.rows].max() <= b.length and len(b.rows) <= b.num_rows for b in batches)
    assert all(b.num_rows * b.length <= 1024 for b in batches) and len({(b.num_rows, b.length) for b in batches}) <= 24
    assert sum(b.num_rows * b.length for b in batches) < 1.15 * lengths.sum()
    assert [padded_length(n) for n in (1, 16, 17, 33, 65, 257)] == [16, 16, 24, 40, 80, 320]
    [alone] = length_batches([5000], batch_tokens=1024)
    assert (alone.num_rows, alone.length) == (1, 5120)


def test_generated_texts_end_at_stop_tokens_and_follow_from_the_seed():
    config = dataclasses.replace(CONFIG, num_layers=1)
    params = jax.tree.map(lambda x: x * 4 if x.ndim == 2 else x, init_params(config, jax.random.key(0)))
    s, trainable = split(config, params, NoPeftConfig(), key=jax.random.key(1)), {}
    prompts, longer = ["Snow", "They won cups"], "And they all sang"
    ids = [TOKENIZER.encode(prompt).tolist() for prompt in prompts]
    options = dict(max_new_tokens=9, chunk=8)
    drawing = dict(key=jax.random.fold_in(jax.random.key(1), 0), sampling=Sampling(temperature=1.0))
    free = np.concatenate(list(generate(config, s.merge, trainable, s.frozen, ids, **drawing, **options)), axis=1)
    assert free.shape == (2, 9) and NO_TOKEN not in free
    stop = int(free[1, 5])

    def text_of(prompt, row):
        end = next((i for i, token in enumerate(row) if token == stop), len(row))
        return TOKENIZER.decode([*TOKENIZER.encode(prompt), *row[:end]])[len(prompt) :]

    expected = [text_of(prompt, row) for prompt, row in zip(prompts, free)]
    write = make_text_generator(
        config, s.merge, trainable, s.frozen, TOKENIZER,
        sampling=Sampling(temperature=1.0, stop_tokens=(stop,)), batch_rows=2, **options,
    )  # fmt: skip
    assert write(prompts, 1) == expected != write(prompts, 2)
    assert write([longer[:16], *prompts], 1)[1:] == expected and write([], 0) == []  # in batches of two, shortest first
    # A prompt that is asked for several times is read once, and each of its texts is drawn for itself.
    several = [0, 0, 1, 0]
    free = np.concatenate(
        list(generate(config, s.merge, trainable, s.frozen, [ids[0]] * 2, **drawing, **options)), axis=1
    )
    alike = [text_of(prompts[0], row) for row in free]
    assert write([prompts[i] for i in several], 1)[:2] == alike and alike[0] != alike[1]
    with pytest.raises(ValueError, match="text 0 has 152 tokens, the model's context has room for 151"):
        write(["a" * 152], 0)
