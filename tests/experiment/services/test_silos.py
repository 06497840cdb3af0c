"""Local teachers: who learns from whom, soft targets of every silo's own teacher, refusals."""

import dataclasses

import numpy as np
import pytest

from fmfl_jax.data.topics import TOPICS
from fmfl_jax.experiment.services import silos
from fmfl_jax.experiment.services.arm import run_arm
from fmfl_jax.experiment.services.foundation import keyword_rules
from fmfl_jax.experiment.services.run import run_services
from tests.experiment.services.built_in import CONFIG, DATA, built_in_corpus, inputs_of


def tunable(asked: list):
    """The rules with a `tune` that makes them surer of the classes of the texts it is given."""
    rules = keyword_rules(TOPICS)

    def with_bonus(bonus):
        def tune(texts, targets, offset, *, num_steps, seed):
            asked.append((list(texts), np.asarray(targets), num_steps, seed, offset))
            return with_bonus(bonus + np.asarray(targets).mean(axis=0))

        score = rules.score
        assert score is not None
        return rules._replace(score=lambda texts: score(texts) + bonus * np.arange(len(texts))[:, None] % 2, tune=tune)

    return with_bonus(np.zeros(4))


def test_every_silo_is_taught_by_its_own_teacher(tmp_path):
    asked: list = []
    config = dataclasses.replace(CONFIG, services=("silos",), data=dataclasses.replace(DATA, num_clients=3))
    inputs = inputs_of(config, built_in_corpus(), tunable(asked))
    arms = {arm.name: arm for arm in silos.silo_arms(inputs)}
    own = [call for call in asked if call[2] == config.lora.num_steps]
    assert [call[0] for call in own] == [one.texts for one in inputs.data.texts]
    for (_, targets, _, _, offset), one, counts in zip(own, inputs.data.texts, inputs.data.histograms):
        # The calibrated scores are shifted to the silo's own labels: the tuning need not learn how skewed they are.
        np.testing.assert_allclose(np.exp(offset + inputs.fm_pool.log_prior[0]), (counts + 1) / (counts.sum() + 4))
        assert targets.argmax(axis=1).tolist() == one.labels.tolist() and set(targets.ravel()) == {0.0, 1.0}
    assert len({call[3] for call in own}) == 3
    mutual = [call for call in asked if call[2] == config.lora.mutual_steps]
    assert mutual and all(set(call[0]) < set(inputs.public.texts) for call in mutual)

    task, train = arms["silo teacher, LoRA"].task, inputs.data.task.train
    n, pool = len(train.y), len(inputs.data.pool)
    assert task.train.y.shape == (n + 3 * pool, 4) and task.train.y.dtype == np.float32
    np.testing.assert_array_equal(task.train.y[:n].argmax(axis=1), train.y)
    assert task.shards.sizes.tolist() == [10 + pool] * 3
    # A row's targets sum to its weight: over the whole batch of a silo the loss is .75 mean own + .25 mean taught.
    own_weight, taught_weight = 0.75 * (10 + pool) / 10, 0.25 * (10 + pool) / pool
    np.testing.assert_allclose(task.train.y[:n].sum(axis=1), own_weight, rtol=1e-5)
    np.testing.assert_allclose(task.train.y[n:].sum(axis=1), taught_weight, rtol=1e-5)
    soft = task.train.y[n:].reshape(3, pool, 4)
    assert np.abs(soft[0] - soft[1]).max() > 0
    shuffled = arms["silo teacher, LoRA, labels shuffled"].task.train.y[n:].reshape(3, pool, 4)
    np.testing.assert_allclose(np.sort(shuffled, axis=1), np.sort(soft, axis=1))
    zero = arms["silo teacher, zero-shot"].task.train.y[n:].reshape(3, pool, 4)
    np.testing.assert_allclose(zero[2], taught_weight * np.exp(inputs.fm_pool.log_probs), rtol=1e-5)
    assert set(np.round(arms["silo teacher, LoRA, labels uniform"].task.train.y[n:].ravel() / taught_weight, 6)) == {
        0.25
    }

    learnt = [silos._silo(inputs, client).selection for client in range(3)]
    more = [int(one.second_learns.sum()) for one in learnt]
    assert arms["silo teacher, mutual"].task.shards.sizes.tolist() == [10 + pool + m for m in more] and sum(more) > 0
    history = run_arm(inputs, arms["silo teacher, mutual"], tmp_path).history
    assert history[1]["fm_placement"] == "client" and history[1]["fm_joules"] > 0 and history[1]["fm_bytes"] == 0


def test_an_fm_that_cannot_be_tuned_is_refused(tmp_path):
    config = dataclasses.replace(CONFIG, services=("silos",))
    with pytest.raises(ValueError, match="services=silos needs a model that can be tuned, and keyword rules"):
        run_services(config, built_in_corpus(), keyword_rules(TOPICS), tmp_path)
