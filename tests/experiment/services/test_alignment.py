"""Groups and swaps by hand; what nothing can show is None."""

import numpy as np
import pytest

from fmfl_jax.data.topics import TOPICS
from fmfl_jax.experiment.services import alignment
from fmfl_jax.experiment.services.foundation import keyword_rules
from fmfl_jax.services.bias import read_word_groups

TEXTS = ["She won the match.", "He won the match.", "Rain again.", "He cooked soup.", "She and he left."]
LABELS = [1, 1, 0, 0, 0]


def test_texts_are_grouped_by_whom_they_mention():
    groups = {"female": frozenset(["she"]), "male": frozenset(["he"])}
    assert alignment.mentions(TEXTS, groups) == ["female", "male", "neither", "male", "female+male"]


def test_a_model_that_goes_by_gender_is_found_out():
    def biased(texts):
        return np.asarray([int("he " in text.lower() and "she " not in text.lower()) for text in texts])

    def fair(texts):
        return np.asarray([int("match" in text) for text in texts])

    found = alignment.alignment({"biased": biased, "fair": fair}, TEXTS, LABELS, 2, least_rows=1)
    assert found["groups"]["male"] == 2 and sum(found["groups"].values()) == 5
    one = found["models"]["fair"]
    assert one["accuracy_gap"] == 0 and one["worst_accuracy"] == 1 and one["swapped_genders"]["flip_rate"] == 0
    one = found["models"]["biased"]
    assert one["accuracy"] == pytest.approx({"female": 0, "male": 0.5, "neither": 1} | _both(found, one))
    assert one["true_positive_gap"] == 1 and one["swapped_names"]["flip_rate"] is None
    # Of four texts with a gender all but the last change their label: both of the pair stand in that one.
    assert one["swapped_genders"]["num_changed"] == 4 and one["swapped_genders"]["flip_rate"] == 0.75


def test_a_small_group_decides_no_gap():
    texts = ["She won."] * 3 + ["He won."] * 2 + ["Rain."] * 3
    always = {"always 1": lambda some: np.ones(len(some), int)}
    found = alignment.alignment(always, texts, [1, 1, 0, 0, 0, 1, 1, 1], 2, least_rows=3)
    assert found["groups"] == {"female": 3, "male": 2, "neither": 3}
    one = found["models"]["always 1"]
    assert set(one["accuracy"]) == {"female", "neither"} and one["accuracy_gap"] == pytest.approx(1 / 3)


def _both(found, one):
    (name,) = [group for group in found["groups"] if "+" in group]
    return {name: one["accuracy"][name]}


def test_written_text_without_a_scorer_has_no_toxicity():
    texts = [["She is a nurse.", "She left."], ["He is an artist.", "He left."]]
    found = alignment.text_metrics(["He said so."], texts, None)
    assert found["toxicity"] is None and found["expected_maximum_toxicity"] is None
    assert found["words"]["male"] == 3 and found["words"]["female"] == 2 and found["bias"] == pytest.approx(0.1)
    assert found["by_profession"]["artist"] == 0.5
    scored = alignment.text_metrics([], texts, lambda some: np.asarray([float("nurse" in text) for text in some]))
    assert scored["toxicity"]["toxic_share"] == 0.25 and scored["expected_maximum_toxicity"] == 0.5


def test_sentences_go_on_from_their_professions():
    fm = keyword_rules(TOPICS)._replace(complete=lambda openings, seed, n: [" he left.\nMore"] * len(openings))
    found = alignment.write_about_professions(fm, 0)
    assert {len(samples) for samples in found} == {4} and found[0][0].endswith("said that he left.")
    assert set(read_word_groups()) == {"female", "male"}
