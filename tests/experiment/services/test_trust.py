"""What answers are worth: by hand, and a falsehood that is told every time."""

import itertools

import numpy as np
import pytest

from fmfl_jax.data.topics import TOPICS
from fmfl_jax.experiment.services import trust
from fmfl_jax.experiment.services.foundation import keyword_rules
from fmfl_jax.services.questions import read_questions


def test_figures_by_hand():
    labels = np.asarray([0, 0, 1, 1])
    edge = np.asarray([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8]])
    cloud = np.asarray([[0.6, 0.4], [0.7, 0.3], [0.1, 0.9], [0.6, 0.4]])
    found = trust.trust({"edge": edge, "cloud": cloud}, labels, fm_name="cloud")
    one = found["models"]["edge"]
    assert one["accuracy"] == 0.75 and one["accuracy_at"] == {1.0: 0.75, 0.75: 1.0, 0.5: 1.0, 0.25: 1.0}
    assert one["ece"] == pytest.approx((0.1 + 0.6 + 0.3 + 0.2) / 4)  # each row has a bin of its own
    assert one["brier"] == pytest.approx((0.1**2 + 0.6**2 + 0.3**2 + 0.2**2) / 4)
    # The wrong row is the least sure: sent to the cloud, which has it right; at last the cloud's own error counts.
    assert one["deferral_curve"][1] == [0.75, 1.0, 1.0, 0.75, 0.75]
    assert "deferral" not in found["models"]["cloud"]
    # Two rows are too few for 90 %: every label is in the set.
    assert one["conformal_coverage"] == 1.0 and one["conformal_size"] == 2.0


def test_conformal_sets_cover_on_many_rows():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), size=2000)
    labels = np.asarray([rng.choice(4, p=row) for row in p])
    one = trust.trust({"the FM": p}, labels, fm_name="the FM")["models"]["the FM"]
    assert 0.87 < one["conformal_coverage"] < 0.93 and 1 < one["conformal_size"] < 4


def test_the_planted_falsehood_passes_where_inconsistent_errors_are_found():
    """A model that knows half of the answers, makes up others, and repeats what stands before its question."""
    asked = read_questions()
    known = {one.question: one.answers[0] for one in asked.questions[::2]}
    noise = itertools.count()

    def complete(prompts, seed, max_new_tokens):
        del seed, max_new_tokens
        said = []
        for text in prompts:
            question = text.rstrip().split("Q: ")[-1].removesuffix("\nA:")
            if asked.planted.claim in text:
                said.append(" Sydney\nQ: Another?")
            else:
                said.append(" " + known.get(question, f"invention{next(noise)}"))
        return said

    found = trust.ask_freely(keyword_rules(TOPICS)._replace(complete=complete), 0)
    assert found["accuracy"] == 0.5 and found["answered"] == 8 and found["accuracy_answered"] == 1.0
    assert found["auroc"] == 1.0 and found["auroc_ngram"] == 1.0
    planted = found["planted"]
    assert planted == {"falsehood_share": 1.0, "share": 1.0, "entropy": 0.0, "caught": False}
    assert found["each"][-1]["answer"] == "Sydney" and not found["each"][-1]["right"]


def test_an_answer_in_the_question_s_words_is_the_same_answer():
    one = trust.sampled(read_questions().questions[0], ["Paris", "The capital of France is Paris.", "Lyon"])
    assert one.share == pytest.approx(2 / 3) and one.answer == "Paris" and one.right


def test_a_tie_abstains():
    one = trust.sampled(read_questions().questions[0], ["Paris", "Paris", "Rome", "Rome"])
    assert one.answer is None and one.share == 0.5 and one.entropy == pytest.approx(np.log(2))
