"""Calibration after the rounds: what a spoilt last layer gets back from statistics, labels and noise."""

import dataclasses

import jax
import numpy as np
import pytest

from fmfl_jax.data.topics import TOPICS
from fmfl_jax.experiment.services import students
from fmfl_jax.experiment.services.calibrate import calibrated, refitted
from fmfl_jax.experiment.services.foundation import keyword_rules
from fmfl_jax.services.ccvr import refit_last_layer
from tests.experiment.services.built_in import CONFIG, built_in_corpus, inputs_of


@pytest.fixture(scope="module")
def found():
    """(inputs, params of good features and a last layer of zeros, rows by name)."""
    corpus = built_in_corpus()
    config = dataclasses.replace(CONFIG, services=("calibrate",), student="hidden")
    inputs = inputs_of(config, corpus, keyword_rules(TOPICS))
    train = inputs.data.task.train
    targets = students.log_labels(train.y, 4)
    params = students.fit(inputs.model, train.x, targets, np.ones(len(train.y), np.float32), 1.0, 300)
    params = params | {"w": 0 * params["w"], "b": 0 * params["b"]}
    # In a worst client's place; the plain sum of a softmax layer's weights stays 0.
    size = lambda new: float(np.abs(new["w"]).sum())
    rows = calibrated(inputs, params, inputs.data.task.test, size)
    return inputs, params, {row["arm"]: row for row in rows}


def test_statistics_and_labels_repair_what_shuffled_labels_do_not(found):
    inputs, params, rows = found
    chance = students.accuracy(inputs.model, params, inputs.data.task.test)
    accuracy = {name: row["accuracy"] for name, row in rows.items()}
    all_rows = accuracy["calibrated, all clients' rows"]
    assert chance < 0.35 and all_rows > chance + 0.15
    assert abs(accuracy["calibrated, CCVR"] - all_rows) < 0.1
    assert accuracy["calibrated, FM-labelled text"] > accuracy["calibrated, FM-labelled text, labels shuffled"] + 0.1


def test_only_ccvr_sends_anything_and_the_worst_client_is_asked_for(found):
    inputs, _, rows = found
    sent = {name for name, row in rows.items() if row["radio_bytes"]}
    assert sent == {"calibrated, CCVR"}
    held = (inputs.data.histograms > 0).sum()
    several = (inputs.data.histograms > 1).sum()
    bits = 4 * len(inputs.data.histograms) + held * 32 * (1 + 32) + several * 32 * (32 * 33 // 2)
    assert rows["calibrated, CCVR"]["radio_bytes"] == bits / 8
    assert len({row["worst_client"] for row in rows.values()}) == len(rows)


def test_the_decay_is_the_best_on_public_rows(found):
    inputs, params, _ = found
    data = inputs.data
    rows = jax.device_get(students.features(inputs.model, params, data.pool_rows.x))
    new = refitted(inputs.model, params, rows, data.pool_rows.y, 4, data.validation)
    best = 0.0
    for decay in (1e-3, 1e-2, 1e-1, 1.0):
        w, b = refit_last_layer(rows, data.pool_rows.y, 4, decay=decay)
        features = np.asarray(students.features(inputs.model, params, data.validation.x))
        best = max(best, float(np.mean((features @ w + b).argmax(axis=1) == data.validation.y)))
    assert students.accuracy(inputs.model, new, data.validation) == pytest.approx(best)


def test_a_student_without_features_is_refused():
    inputs = inputs_of(CONFIG, built_in_corpus(), keyword_rules(TOPICS))
    with pytest.raises(ValueError, match="student=hidden"):
        students.features(inputs.model, inputs.model.init(jax.random.key(0)), inputs.data.pool_rows.x)
