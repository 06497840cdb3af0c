"""How far answers can be trusted (sections II-B, III-D): of students and FM on rows, and of what the FM says.

Rows: calibration error, what abstaining buys (risk-coverage), what asking the FM buys (deferral from edge to cloud),
conformal sets. Text: the FM is asked the same questions several times; agreement with itself should tell what it makes
up, and cannot where a falsehood is planted that it repeats every time.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fmfl_jax.experiment.services.foundation import FoundationModel
from fmfl_jax.services import confidence, hallucination, questions
from fmfl_jax.services.selfcheck import ngram_scores
from fmfl_jax.services.words import words_of

_BINS, _ALPHA = 10, 0.1
_COVERAGES = (1.0, 0.75, 0.5, 0.25)
_SAMPLES, _NEW_TOKENS, _MIN_SHARE = 8, 12, 0.5
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # deferred


class Sampled(NamedTuple):
    """A question's samples: the majority's answer (None: abstained), its share, the entropy over clusters in nats, the
    n-gram score of the answer against the samples, and whether it is right."""

    question: str
    answer: str | None
    share: float
    entropy: float
    ngram: float
    right: bool


def trust(probabilities: Mapping[str, np.ndarray], labels: np.ndarray, *, fm_name: str) -> dict:
    """{model: figures} of probabilities float64 [N, K] on rows with labels int [N]; deferral of every other model's
    least sure answers to fm_name. Conformal sets: threshold from the first half of the rows, coverage on the second."""
    right = {name: p.argmax(axis=1) == labels for name, p in probabilities.items()}
    half, found = len(labels) // 2, {}
    for name, p in probabilities.items():
        sure, hits = np.minimum(p.max(axis=1), 1.0), right[name]
        coverage, risk = confidence.risk_coverage(sure, hits)
        threshold = confidence.conformal_threshold(p[:half], labels[:half], alpha=_ALPHA)
        sets = confidence.prediction_sets(p[half:], threshold)
        found[name] = {
            "accuracy": float(hits.mean()),
            "ece": confidence.expected_calibration_error(sure, hits, num_bins=_BINS),
            "brier": confidence.brier_score(sure, hits),
            "auroc": confidence.auroc(sure, hits),
            "aurc": confidence.area_under_risk_coverage(sure, hits),
            "accuracy_at": {c: float(1 - risk[max(round(c * len(labels)), 1) - 1]) for c in _COVERAGES},
            "conformal_coverage": float(sets[np.arange(len(sets)), labels[half:]].mean()),
            "conformal_size": float(sets.sum(axis=1).mean()),
            "curve": [coverage.tolist(), risk.tolist()],
        }
        if name != fm_name:
            shares, accuracy = confidence.deferral_curve(sure, hits, right[fm_name])
            found[name]["deferral"] = [[s, float(accuracy[np.abs(shares - s).argmin()])] for s in SHARES]
            found[name]["deferral_curve"] = [shares.tolist(), accuracy.tolist()]
    return {"rows": len(labels), "bins": _BINS, "alpha": _ALPHA, "models": found}


def ask_freely(fm: FoundationModel, seed: int) -> dict:
    """Questions with known answers, each asked several times, and one with a planted falsehood.

    auroc: of the entropy for "the answer is wrong". accuracy_answered: of those without an abstention. planted: what
    became of the falsehood; caught where the model abstains or the entropy is above the questions' median.
    """
    assert fm.complete is not None
    asked = questions.read_questions()
    everything = (*asked.questions, asked.planted)
    prompts = [questions.prompt(asked, one) for one in everything for _ in range(_SAMPLES)]
    texts = [questions.first_line(text) for text in fm.complete(prompts, seed, _NEW_TOKENS)]
    found = [sampled(one, texts[i * _SAMPLES : (i + 1) * _SAMPLES]) for i, one in enumerate(everything)]
    own, planted = found[:-1], found[-1]
    entropy, wrong = np.asarray([one.entropy for one in own]), np.asarray([not one.right for one in own])
    answered = np.asarray([one.answer is not None for one in own])
    repeats = texts[len(asked.questions) * _SAMPLES :]
    return {
        "samples": _SAMPLES,
        "questions": len(own),
        "answered": int(answered.sum()),
        "accuracy": float(1 - wrong.mean()),
        "accuracy_answered": float(1 - wrong[answered].mean()) if answered.any() else None,
        "auroc": confidence.auroc(entropy, wrong),
        "auroc_ngram": confidence.auroc([one.ngram for one in own], wrong),
        "planted": {
            "falsehood_share": float(np.mean([questions.holds(text, asked.planted.falsehood) for text in repeats])),
            "share": planted.share,
            "entropy": planted.entropy,
            "caught": planted.answer is None or planted.entropy > float(np.median(entropy)),
        },
        "each": [one._asdict() for one in found],
    }


def sampled(one: questions.Question, answers: list[str]) -> Sampled:
    """Of one question's sampled answers: clusters by words that the question lacks, entropy by counts."""
    repeated = set(words_of(one.question))  # "The capital of Peru is Lima" is "Lima"
    cores = [" ".join(word for word in words_of(answer) if word not in repeated) for answer in answers]
    clusters = hallucination.lexical_clusters(cores)
    majority = hallucination.self_consistency(clusters, min_share=_MIN_SHARE)
    first = max(set(clusters), key=clusters.count)
    said = answers[clusters.index(first)]
    scores = ngram_scores([said or "-"], answers).mean[0]
    return Sampled(
        one.question,
        None if majority.answer is None else said,
        majority.share,
        hallucination.entropy_by_counts(clusters),
        float(np.nan_to_num(scores)),
        questions.holds(said, one.answers),
    )
