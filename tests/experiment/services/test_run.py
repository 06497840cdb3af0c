"""All services together on the built-in task: arms and report; the run over a cache equals the live one; refusals."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.data.topics import TOPICS, topic_texts
from fmfl_jax.experiment.config.network import NetworkConfig
from fmfl_jax.experiment.services import arms, students
from fmfl_jax.experiment.services.arm import run_arm
from fmfl_jax.experiment.services.config import Bits, PlacementConfig, TopK, Unsure
from fmfl_jax.experiment.services.data import mixture_parts
from fmfl_jax.experiment.services.foundation import answers, in_words, keyword_rules, written
from fmfl_jax.experiment.services.report import mean_figures, measures, summarize, table, write_report
from fmfl_jax.experiment.services.run import run_services
from fmfl_jax.experiment.services.sections import spread
from tests.experiment.services.built_in import CONFIG, DATA, built_in_corpus, inputs_of


@pytest.fixture(scope="module")
def corpus():
    return built_in_corpus()


@pytest.fixture(scope="module")
def writer():
    def write(label, count, seed):
        notes, _ = topic_texts(8 * count, 0, seed=1000 + seed)
        return [text for text, found in zip(*notes) if found == label][:count]

    return keyword_rules(TOPICS)._replace(write=write)


def test_the_command_s_work_and_its_report(corpus, tmp_path):
    network = NetworkConfig(network="facts_20")
    config = dataclasses.replace(
        CONFIG, services=("distill", "evaluate", "alignment", "trust"), num_rounds=2, network=network
    )
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
    assert 0 <= rows["evaluation"]["overfitting"]["auroc"] <= 1
    assert [one["share"] > 0.9 for one in rows["evaluation"]["coverage"]] == [True]
    for name in (
        "accuracy_rounds",
        "accuracy_seconds",
        "accuracy_joules",
        "accuracy_bytes",
        "risk_coverage",
        "deferral",
    ):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    deferral = dict(rows["trust"]["models"]["distill"]["deferral"])
    assert deferral[0.0] == rows["trust"]["models"]["distill"]["accuracy"]
    assert deferral[1.0] == rows["trust"]["models"]["the FM"]["accuracy"]
    assert rows["alignment"]["text"] is None and "bias and toxicity are unknown" in text
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


def test_means_of_nested_figures():
    found = mean_figures([{"a": 1.0, "b": [[1, None], 5]}, {"a": 2.0, "b": [[1, 4.0], 6]}])
    assert found == {"a": 1.5, "b": [[1, 4.0], 5.5]}
    assert mean_figures([{"a": None, "name": "x"}] * 2) == {"a": None, "name": "x"}


def test_the_spread_of_a_figure_by_hand():
    seeds = [{"a": {"x": 0.1, "y": 0.5, "z": None}}, {"a": {"x": 0.3, "y": 0.5, "z": 0.25}}]
    assert spread(seeds, ("a", "x"), ".3f") == "0.200 ± 0.141"
    assert spread(seeds, ("a", "y"), ".1%") == "50.0%"
    assert spread(seeds, ("a", "z"), ".2f") == "0.25"
    assert spread(seeds[:1], ("a", "z"), ".2f") == "-"


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
        result = run_arm(inputs, arm, tmp_path / str(only_first))
        states.append(jax.device_get(result.state.params))
        kinds.append([record["fm_served"] for record in result.history[1:]])
    assert kinds == [["live"] * 4, ["live", "cached", "cached", "cached"]]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_asking_when_unsure_waits_for_the_warm_up_and_nobody_teaches_in_an_outage(corpus, tmp_path):
    config = dataclasses.replace(CONFIG, ask=Unsure(fraction=0.25, warmup_rounds=2), logits=TopK(k=2))
    inputs = inputs_of(config, corpus, keyword_rules(TOPICS))
    made = arms.make_arms(inputs, tmp_path)
    asked = run_arm(inputs, made[1], tmp_path / "asked").history
    plain = run_arm(inputs, made[0], tmp_path / "plain").history
    assert [r["accuracy"] for r in asked[:3]] == [r["accuracy"] for r in plain[:3]]
    assert asked[3]["fm_texts"] == 15 and "fm_served" not in asked[2] and asked[4]["fm_served"] == "cached"
    assert "distillation_loss" in asked[3] and "distillation_loss" not in asked[2]


def test_features_are_aligned_to_what_the_clients_fetched(corpus, tmp_path):
    """The whole set goes to every client once; an FM that cannot be reached at the start aligns nothing."""
    config = dataclasses.replace(CONFIG, services=("features",), student="hidden")
    inputs = inputs_of(config, corpus, keyword_rules(TOPICS))
    several = inputs.settings.fedavg._replace(local_epochs=2)  # in the first step client and server are one model
    inputs = inputs._replace(settings=inputs.settings._replace(fedavg=several))
    plain, aligned, random = arms.make_arms(inputs, tmp_path)
    assert aligned.penalty is not None and random.fm_rounds == ()
    x = jnp.asarray(aligned.task.train.x[len(inputs.data.task.train.x) :])
    assert {tuple(row) for row in x.tolist()} <= {tuple(row) for row in inputs.data.pool_rows.x.tolist()}
    params = inputs.model.init(jax.random.key(0))
    moved = params | {"hidden": params["hidden"] + 0.1}
    frozen = {"x": aligned.task.train.x}
    features = inputs.model.features
    assert features is not None
    apart = np.asarray(features(moved, x) - features(params, x))
    expected = np.square(apart).sum() / len(x)
    np.testing.assert_allclose(aligned.penalty(moved, params, frozen), expected, rtol=1e-5)
    assert aligned.penalty(params, params, frozen) == 0
    texts_sent = aligned.fm_rounds[0].bytes_down
    assert texts_sent > DATA.num_clients * 4 * len(x)
    runs = [run_arm(inputs, arm, tmp_path / arm.name).state.params for arm in (plain, aligned)]
    assert np.abs(np.asarray(runs[0]["hidden"] - runs[1]["hidden"])).max() > 0
    away = PlacementConfig(placement="cloud", mean_up_rounds=1e-9, mean_down_rounds=1e9)
    out_of_reach = inputs._replace(config=dataclasses.replace(config, placement=away))
    assert arms.aligned(out_of_reach)[0].penalty is None


def test_an_fm_that_gives_only_text_labels_and_counts_nothing_where_it_says_nothing(corpus, tmp_path):
    rules = keyword_rules(TOPICS)
    spoken = in_words(rules)
    texts = ["The soup needs salt.", "Nothing happened.", "Snow and fog."]
    found = np.exp(answers(spoken, texts).log_probs)
    assert found.argmax(axis=1)[[0, 2]].tolist() == [TOPICS.index("cooking"), TOPICS.index("weather")]
    np.testing.assert_allclose(found[1], 0.25)
    np.testing.assert_allclose(found[0].max(), 1.1 / 1.4)
    config = dataclasses.replace(CONFIG, services=("augment", "reweight"), fm_access="text")
    inputs = inputs_of(config, corpus, spoken)
    assert len(arms.make_arms(inputs, tmp_path)) == 11
    silent = spoken._replace(vote=lambda texts: np.zeros((len(texts), 4)))
    with pytest.raises(ValueError, match="fm_access=text: .* named no class in its answers to"):
        run_services(config, corpus, silent, tmp_path, say=lambda line: None)
    prior = answers(rules, texts)
    np.testing.assert_allclose(
        answers(rules, texts[:1], log_prior=prior.log_prior).log_probs[0], prior.log_probs[0], rtol=1e-9
    )


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
        ({"services": ("calibrate",)}, "services=calibrate needs features: student=hidden, not student=linear"),
        ({"fm_access": "text"}, "services=distill needs the FM's logits, and with fm_access=text it gives only text"),
        ({"data": dataclasses.replace(DATA, num_pool=20), "align_strengths": ()}, "align_strengths is empty"),
        ({"services": ("teach",)}, "services=teach: expected one of distill, generate"),
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
