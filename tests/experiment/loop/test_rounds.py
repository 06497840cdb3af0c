"""The round loop on a small real model: resume, frozen base, federated against centralized."""

import jax
import numpy as np
import optax
import pytest

from fmfl_jax.config import llama_preset
from fmfl_jax.data.batches import evaluation_windows, token_windows
from fmfl_jax.data.corpora import python_topics
from fmfl_jax.data.partition import random_partition
from fmfl_jax.data.tokenizers import byte_tokenizer
from fmfl_jax.experiment.build.language_model import ClientData, window_batches
from fmfl_jax.experiment.config.pretrain import PretrainConfig
from fmfl_jax.experiment.config.rounds import RoundsConfig
from fmfl_jax.experiment.evaluation.perplexity import make_evaluator
from fmfl_jax.experiment.loop.participation import CohortSchedule
from fmfl_jax.experiment.loop.rounds import Callbacks, Source, run_rounds
from fmfl_jax.experiment.pretrain import pretrain
from fmfl_jax.fed import selection
from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from fmfl_jax.fed.core.round import make_round
from fmfl_jax.models.loss import token_nll
from fmfl_jax.parallel import replicate
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.split import split


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    config = llama_preset("tiny", num_layers=1, embed_dim=32, hidden_dim=64, num_heads=2, num_kv_heads=1)
    documents = python_topics()
    public = token_windows(byte_tokenizer(), documents, 32, add_bos=False, add_eos=False).windows
    params = pretrain(
        config,
        PretrainConfig(num_steps=100, batch_size=16, learning_rate=1e-2),
        public,
        directory=tmp_path_factory.mktemp("pretrain"),
    )
    # The clients' text is in capitals: something that the base has to be tuned for.
    shouted = [document.upper() for document in documents]
    train = token_windows(byte_tokenizer(), shouted[1:], 32, add_bos=False, add_eos=False).windows
    held_out = evaluation_windows(byte_tokenizer(), shouted[:1], 32, add_bos=False, add_eos=False)
    model = split(config, params, LoraConfig(rank=4, dropout=0.1, targets=("*_proj",)), key=jax.random.key(1))

    def loss_fn(trainable, frozen, windows, key):
        return token_nll(model.merge(trainable, frozen), windows, dropout_key=key).mean()

    data = ClientData(train, random_partition(len(train), 12, rng=0))
    return model, loss_fn, data, make_evaluator(model.merge, held_out)


def rounds_of(setting, config, server_optimizer, directory):
    model, loss_fn, data, evaluate = setting
    return run_rounds(
        config,
        make_round(fed_opt(jax.value_and_grad(loss_fn), optax.adamw(1e-2), server_optimizer)),
        model.trainable,
        model.frozen,
        Source(sizes=data.sizes, batches=window_batches(config, data)),
        CohortSchedule(selector=selection.uniform(config.cohort_size), sizes=np.float32(data.sizes), seed=config.seed),
        Callbacks(at_evaluation=(lambda view: evaluate(view.state.params, view.frozen)._asdict(),)),
        directory=directory,
    )


def run(setting, directory, num_rounds):
    config = RoundsConfig(num_rounds=num_rounds, cohort_size=10, local_steps=2, batch_size=2, checkpoint_every=2)
    return rounds_of(setting, config, optax.adam(1e-2), directory)


@pytest.fixture(scope="module")
def base_before(setting):
    return jax.tree.map(np.array, setting[0].frozen)


@pytest.fixture(scope="module")
def whole(setting, base_before, tmp_path_factory):
    return run(setting, tmp_path_factory.mktemp("whole"), 4)


def test_stopped_and_continued_is_bit_identical(setting, whole, tmp_path):
    run(setting, tmp_path / "parts", 2)
    parts = run(setting, tmp_path / "parts", 4)
    jax.tree.map(np.testing.assert_array_equal, whole.state, parts.state)
    assert [r["loss"] for r in whole.history[1:]] == [r["loss"] for r in parts.history[1:]]
    assert [r["ppl"] for r in whole.history] == [r["ppl"] for r in parts.history]
    assert whole.history[-1]["ppl"] < whole.history[0]["ppl"]


def test_killed_between_checkpoints_goes_back_to_the_last_whole_one(setting, whole, tmp_path):
    model, loss_fn, data, evaluate = setting
    calls = []

    def killed(trainable, frozen):
        calls.append(1)
        if len(calls) == 4:  # the evaluations of rounds 0, 1, 2, then round 3's
            raise KeyboardInterrupt
        return evaluate(trainable, frozen)

    with pytest.raises(KeyboardInterrupt):
        run((model, loss_fn, data, killed), tmp_path / "killed", 4)
    again = run(setting, tmp_path / "killed", 4)
    jax.tree.map(np.testing.assert_array_equal, whole.state, again.state)
    assert [r["round"] for r in again.history] == [0, 1, 2, 3, 4]


def test_the_base_is_untouched_and_every_factor_moved(base_before, setting, whole):
    model = setting[0]
    jax.tree.map(np.testing.assert_array_equal, base_before, jax.device_get(model.frozen))
    for name, value in whole.state.params.items():
        assert np.abs(value - model.trainable[name]).max() > 0, name


def test_federated_is_close_to_centralized_on_the_same_tokens(setting, tmp_path):
    """IID clients, few local steps: within 5 % of the perplexity of AdamW on the pooled data, same number of tokens."""
    model, loss_fn, data, evaluate = setting
    rounds, steps, batch = 8, 2, 4
    config = RoundsConfig(num_rounds=rounds, cohort_size=12, local_steps=steps, batch_size=batch)
    plain = optax.sgd(1.0)
    federated = rounds_of(setting, config, plain, tmp_path).history[-1]["ppl"]
    pooled = ClientData(data.windows, [np.arange(len(data.windows))])
    config = RoundsConfig(num_rounds=1, cohort_size=1, local_steps=rounds * steps, batch_size=batch * 12)
    centralized = rounds_of((model, loss_fn, pooled, evaluate), config, plain, tmp_path / "central").history[-1]["ppl"]
    start = evaluate(replicate(model.trainable), replicate(model.frozen)).ppl
    assert federated < 0.7 * start and centralized < 0.7 * start  # both learnt something
    assert federated < 1.05 * centralized, (federated, centralized)
