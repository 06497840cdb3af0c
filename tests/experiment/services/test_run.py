"""All services together on the built-in task: arms and report; the run over a cache equals the live one; refusals."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from fmfl_jax.data.topics import TOPICS, topic_texts
from fmfl_jax.experiment.config.network import NetworkConfig
from fmfl_jax.experiment.services import arms, students
from fmfl_jax.experiment.services.config import Bits, DataConfig, PlacementConfig, ServicesConfig, TopK, Unsure
from fmfl_jax.experiment.services.data import Corpus, hashed_rows, mixture_parts, seed_data
from fmfl_jax.experiment.services.data import test_texts as draw_test_texts
from fmfl_jax.experiment.services.foundation import answers, keyword_rules, written
from fmfl_jax.experiment.services.report import measures, summarize, table, write_report
from fmfl_jax.experiment.services.run import run_services
from fmfl_jax.models.classifiers import linear_text_classifier

DATA = DataConfig(
    num_clients=6,
    rows_per_client=10,
    num_pool=60,
    num_labelled=20,
    num_validation=40,
    num_test=100,
    num_judged=80,
    num_buckets=512,
    max_ngrams=24,
)
CONFIG = ServicesConfig(
    services=("distill",),
    data=DATA,
    num_rounds=4,
    cohort_size=3,
    learning_rates=(8.0,),
    server_steps=3,
    num_generated=16,
    target_accuracy=0.4,
    seeds=1,
)


@pytest.fixture(scope="module")
def corpus():
    train, test = topic_texts(600, 200, seed=0)
    return Corpus(train, test, TOPICS)


@pytest.fixture(scope="module")
def writer():
    def write(label, count, seed):
        notes, _ = topic_texts(8 * count, 0, seed=1000 + seed)
        return [text for text, found in zip(*notes) if found == label][:count]

    return keyword_rules(TOPICS)._replace(write=write)


def inputs_of(config, corpus, fm, seed=0):
    test = hashed_rows(draw_test_texts(corpus, config.data, 0), config.data)
    data = seed_data(corpus, config.data, test, seed)
    model = linear_text_classifier(config.data.num_buckets, 4)
    return arms.Inputs(
        config, arms.Tuned(8.0, 1), arms.Tuned(8.0, 1, 4.0), model, fm, data, seed, answers(fm, data.pool)
    )


def test_the_command_s_work_and_its_report(corpus, tmp_path):
    network = NetworkConfig(network="facts_20")
    config = dataclasses.replace(CONFIG, services=("distill", "evaluate"), num_rounds=2, network=network)
    result = run_services(config, corpus, keyword_rules(TOPICS), tmp_path, say=lambda line: None)
    names = list(result.histories)
    assert names == ["fedavg", "distill", "distill, labels shuffled", "distill, labels uniform"]
    assert all(len(runs) == 1 and len(runs[0]) == 3 for runs in result.histories.values())
    text = write_report(tmp_path, result, config.target_accuracy, "keyword rules")
    assert text.count("\n| ") >= len(names) and "no federation: on the FM's labels" in text
    rows = json.loads((tmp_path / "rows.json").read_text())
    by_name = {row["arm"]: row for row in rows["summary"]}
    assert by_name["distill"]["accuracy"] > by_name["distill, labels shuffled"]["accuracy"]
    assert by_name["distill"]["served"] == {"live": 0.5, "cached": 0.5, "fallback": 0.0, "none": 0.0}
    assert by_name["distill"]["fm_texts"] == 60 and by_name["fedavg"]["served"] is None
    assert 0 <= rows["evaluation"]["overfitting"]["auroc"] <= 1 and rows["evaluation"]["coverage"] > 0.9
    for name in ("rounds", "seconds", "joules", "bytes"):
        assert (tmp_path / f"accuracy_{name}.png").stat().st_size > 5000
    lines = (tmp_path / "seed0" / "distill" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["fm_served"] == "live" and json.loads(lines[2])["fm_seconds"] == 0


def test_the_summary_of_two_seeds_by_hand():
    history = lambda accuracies: [{"round": i, "accuracy": a, "uplink_bytes": 1e6} for i, a in enumerate(accuracies)]
    rows = [
        {"arm": "fedavg", "seed": seed, "worst_client": 0.2} | measures(history(found), 0.5)
        for seed, found in enumerate(([0.2, 0.4, 0.6], [0.2, 0.2, 0.2]))
    ]
    (found,) = summarize(rows)
    assert found["accuracy"] == pytest.approx(0.3) and found["accuracy_std"] == pytest.approx(0.2 / 2**0.5)
    assert (found["reached"], found["rounds_to"], found["first_round"]) == (1, 1, 2)  # .4 and .6 average .5
    assert (found["seconds_to"], found["radio_bytes"]) == (None, 3e6)
    line = table([found], 0.5).splitlines()[2]
    assert "0.300 ± 0.141" in line and "1 (1 of 2)" in line


def test_every_service_makes_its_arms(corpus, writer, tmp_path):
    """Their aggregators run in test_teachers.py."""
    config = dataclasses.replace(CONFIG, services=("generate", "augment", "ensemble", "reweight"))
    inputs = inputs_of(config, corpus, writer)
    made = written(writer, 4, 16, 0)
    inputs = inputs._replace(generated=made, fm_generated=answers(writer, made.texts))
    found = {arm.name: arm for arm in arms.make_arms(inputs, tmp_path)}
    assert {"fedavg", "generated", "generated, no labels", "feddf", "mixed 0.5", "fltrust, sign flip"} < set(found)
    augmented = found["augment"].task
    assert augmented.shards.sizes.sum() == len(augmented.train.y) > len(inputs.data.task.train.y)
    parts = np.split(augmented.shards.rows, augmented.shards.starts[1:-1])
    after = np.stack([np.bincount(augmented.train.y[rows], minlength=4) for rows in parts])
    before = inputs.data.histograms
    assert np.mean(after.min(1) / after.max(1)) > np.mean(before.min(1) / before.max(1))
    assert found["augment"].fm_rounds[0].absent_classes == (before == 0).sum() > 0
    assert found["augment"].fm_rounds[0].bytes_down > 0 and not found["feddf"].fm_rounds


def test_a_run_over_the_cache_equals_the_live_one_bit_for_bit(corpus, tmp_path):
    """The FM is asked in every round; once it can be reached each time, once in the first round only."""
    states, kinds = [], []
    for only_first in (False, True):
        placement = PlacementConfig(placement="cloud", ask_every_round=True, only_first_round=only_first)
        inputs = inputs_of(dataclasses.replace(CONFIG, placement=placement), corpus, keyword_rules(TOPICS))
        arm = arms.make_arms(inputs, tmp_path)[1]
        result = arms.run_arm(inputs, arm, tmp_path / str(only_first))
        states.append(jax.device_get(result.state.params))
        kinds.append([record["fm_served"] for record in result.history[1:]])
    assert kinds == [["live"] * 4, ["live", "cached", "cached", "cached"]]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_asking_when_unsure_waits_for_the_warm_up_and_nobody_teaches_in_an_outage(corpus, tmp_path):
    config = dataclasses.replace(CONFIG, ask=Unsure(fraction=0.25, warmup_rounds=2), logits=TopK(k=2))
    inputs = inputs_of(config, corpus, keyword_rules(TOPICS))
    made = arms.make_arms(inputs, tmp_path)
    asked = arms.run_arm(inputs, made[1], tmp_path / "asked").history
    plain = arms.run_arm(inputs, made[0], tmp_path / "plain").history
    assert [r["accuracy"] for r in asked[:3]] == [r["accuracy"] for r in plain[:3]]
    assert asked[3]["fm_texts"] == 15 and "fm_served" not in asked[2] and asked[4]["fm_served"] == "cached"
    assert "distillation_loss" in asked[3] and "distillation_loss" not in asked[2]


def test_clients_have_as_many_rows_each_once_and_skewed_labels():
    labels = np.random.default_rng(0).integers(4, size=2000)
    rows = np.random.default_rng(1).permutation(2000)
    parts = mixture_parts(labels, rows, 20, 30, alpha=0.1, rng=np.random.default_rng(2))
    assert all(len(part) == 30 for part in parts) and len(set(np.concatenate(parts).tolist())) == 600
    largest = np.mean([np.bincount(labels[part], minlength=4).max() / 30 for part in parts])
    even = mixture_parts(labels, rows, 20, 30, alpha=1e4, rng=np.random.default_rng(2))
    assert largest > 0.75 > 0.5 > np.mean([np.bincount(labels[part], minlength=4).max() / 30 for part in even])


def test_the_worst_client_by_hand():
    assert students.worst_client(np.asarray([0.9, 0.5]), np.asarray([[3, 1], [1, 3]])) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"services": ("teach",)}, "services=teach: expected some of distill, generate"),
        ({"cohort_size": 7}, "cohort_size is 7, but there are 6 clients"),
        ({"ask": Unsure(fraction=0.5, warmup_rounds=4)}, "ask: warmup_rounds is 4, but num_rounds 4"),
        ({"network": NetworkConfig(network="umi_20", aggregation="over_the_air")}, "aggregation=over_the_air"),
        ({"learning_rates": (float("nan"),)}, "learning_rates must be a finite number"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(CONFIG, **changes)


def test_what_the_data_and_the_model_cannot_do_is_refused(corpus, tmp_path):
    rules = keyword_rules(TOPICS)
    with pytest.raises(ValueError, match="logits=topk:4: expected fewer than the task's 4 classes"):
        run_services(dataclasses.replace(CONFIG, logits=TopK(k=4)), corpus, rules, tmp_path)
    with pytest.raises(ValueError, match="the training texts are 600"):
        run_services(dataclasses.replace(CONFIG, data=dataclasses.replace(DATA, num_pool=900)), corpus, rules, tmp_path)
    with pytest.raises(ValueError, match="needs a model that writes"):
        written(rules, 4, 8, 0)
    with pytest.raises(ValueError, match="know no class 'World'"):
        keyword_rules(("World", "Sports"))
    with pytest.raises(ValueError, match="row 0 of the scores holds NaN"):
        answers(rules._replace(score=lambda texts: np.full((len(texts), 4), np.nan)), ["a b c"])
    with pytest.raises(ValueError, match="1 to 16 bits"):
        Bits(bits=0)
