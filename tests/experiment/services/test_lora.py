"""The silo's tuned FM, a tiny one: it learns, its engine sees what was learnt, and the base stays as it was."""

import jax
import numpy as np
import pytest

from fmfl_jax.config import llama_preset
from fmfl_jax.data.tokenizers import byte_tokenizer
from fmfl_jax.experiment.services.config import LoraTuning
from fmfl_jax.experiment.services.lora import make_tuner
from fmfl_jax.models.params import init_params
from fmfl_jax.models.scoring import make_engine
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.split import NoPeftConfig, split

CONFIG = llama_preset("tiny", num_layers=2, max_seq_len=64)
PROMPTS = ["alpha x:", "beta xx:", "gamma xxx:", "delta:", "omega xx:", "sigma x:", "kappa:"]
WORDS = ["n", "y"]
LABELS = np.asarray([0, 1, 0, 1, 1, 0, 1])
NO_OFFSET = np.zeros(2)
TUNED = ("layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj")  # the last third of two layers


@pytest.fixture(scope="module")
def tuner():
    params = init_params(CONFIG, jax.random.key(0))
    tuning = LoraTuning(learning_rate=3e-2, batch_size=4, max_tokens=16)
    return make_tuner(CONFIG, params, byte_tokenizer(), WORDS, tuning), params


def class_log_p(scores):
    scores = np.asarray(scores, np.float64)
    return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)


def test_it_learns_labels_and_goes_on_from_where_it_was(tuner):
    made, params = tuner
    before = {name: np.asarray(value).copy() for name, value in params.items()}
    targets = np.eye(2)[LABELS]
    few = made.tune(PROMPTS, targets, NO_OFFSET, num_steps=5, seed=0, start=None)
    more = made.tune(PROMPTS, targets, NO_OFFSET, num_steps=40, seed=0, start=few)
    base = split(CONFIG, params, NoPeftConfig(), key=jax.random.key(0))
    start = class_log_p(make_engine(CONFIG, base.merge, {}, base.frozen, byte_tokenizer()).score(PROMPTS, WORDS))
    untuned = {name: value for name, value in few.items() if "lora_a" in name}
    untuned |= {name: np.zeros_like(value) for name, value in few.items() if "lora_b" in name}
    np.testing.assert_allclose(class_log_p(made.score(untuned, PROMPTS)), start, atol=1e-5)
    found = [class_log_p(made.score(factors, PROMPTS)) for factors in (few, more)]
    tuned = split(CONFIG, params, LoraConfig(rank=8, alpha=16.0, targets=TUNED), key=jax.random.key(0))
    engine = make_engine(CONFIG, tuned.merge, more, tuned.frozen, byte_tokenizer())
    np.testing.assert_allclose(class_log_p(engine.score(PROMPTS, WORDS)), found[1], atol=1e-4)
    nll = [float(-log_p[np.arange(len(LABELS)), LABELS].mean()) for log_p in (start, *found)]
    assert nll[0] > nll[1] > nll[2] and nll[2] < 0.2
    jax.tree.map(np.testing.assert_array_equal, before, {name: np.asarray(value) for name, value in params.items()})


def test_the_same_seed_gives_the_same_factors_and_words_must_differ_at_once(tuner):
    made, params = tuner
    targets = np.eye(2)[LABELS]
    once, again = (made.tune(PROMPTS, targets, NO_OFFSET, num_steps=3, seed=1, start=None) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, again)
    alike = make_tuner(CONFIG, params, byte_tokenizer(), ["no", "now"], LoraTuning(max_tokens=16))
    with pytest.raises(ValueError, match="begin with the same token"):
        alike.tune(PROMPTS, targets, NO_OFFSET, num_steps=1, seed=0, start=None)


def test_a_prior_that_the_offset_explains_is_not_learnt(tuner):
    """Nine rows in ten have label 0, whatever the text: the tuned scores say so, less what the offset says already."""
    made, _ = tuner
    mostly = np.tile([0.9, 0.1], (len(PROMPTS), 1))
    margins = []
    for offset in (NO_OFFSET, np.log([0.9, 0.1])):
        scores = made.score(made.tune(PROMPTS, mostly, offset, num_steps=60, seed=0, start=None), PROMPTS)
        margins.append(float(np.mean(scores[:, 0] - scores[:, 1])))
    np.testing.assert_allclose(margins, [np.log(9), 0], atol=0.3)
