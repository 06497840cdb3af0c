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
from fmfl_jax.peft.split import NoPeftConfig, split

CONFIG = llama_preset("tiny", num_layers=1, max_seq_len=64)
PROMPTS = ["alpha x:", "beta xx:", "gamma xxx:", "delta:", "omega xx:", "sigma x:"]
WORDS = ["n", "y"]
LABELS = np.asarray([0, 1, 0, 1, 1, 0])
NO_OFFSET = np.zeros(2)


@pytest.fixture(scope="module")
def tuner():
    params = init_params(CONFIG, jax.random.key(0))
    tuning = LoraTuning(learning_rate=3e-2, batch_size=6, max_tokens=16)
    return make_tuner(CONFIG, params, byte_tokenizer(), WORDS, tuning), params


def class_nll(engine, labels):
    scores = np.asarray(engine.score(PROMPTS, WORDS), np.float64)
    log_p = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    return float(-log_p[np.arange(len(labels)), labels].mean())


def test_it_learns_labels_and_goes_on_from_where_it_was(tuner):
    made, params = tuner
    before = {name: np.asarray(value).copy() for name, value in params.items()}
    targets = np.eye(2)[LABELS]
    few = made.tune(PROMPTS, targets, NO_OFFSET, num_steps=5, seed=0, start=None)
    more = made.tune(PROMPTS, targets, NO_OFFSET, num_steps=40, seed=0, start=few)
    base = split(CONFIG, params, NoPeftConfig(), key=jax.random.key(0))
    start = class_nll(make_engine(CONFIG, base.merge, {}, base.frozen, byte_tokenizer()), LABELS)
    found = [class_nll(made.engine(factors), LABELS) for factors in (few, more)]
    assert start > found[0] > found[1] and found[1] < 0.2
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
    """All rows have label 1: without an offset the tuned scores lean to it; with one that says so they hardly do."""
    made, _ = tuner
    always = np.tile([0.0, 1.0], (len(PROMPTS), 1))
    margins = []
    for offset in (NO_OFFSET, np.asarray([0.0, 12.0])):
        scores = made.engine(made.tune(PROMPTS, always, offset, num_steps=20, seed=0, start=None)).score(PROMPTS, WORDS)
        margins.append(float(np.mean(scores[:, 1] - scores[:, 0])))
    assert margins[0] > margins[1] + 0.2
