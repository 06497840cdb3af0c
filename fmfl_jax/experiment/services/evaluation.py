"""The foundation model as evaluator of the trained students (section III-C).

Rows judged by the FM are test rows, which no student saw. A few of them count as labelled, the rest as unlabelled; the
accuracy on all test rows is what the estimates are held against. Students for the over-fitting alarm are trained here:
some for 100 epochs on 50 rows, some on thousands; the FM's answers on the pools say how they agree on training text.
"""

import numpy as np

from fmfl_jax import streams
from fmfl_jax.data.classification import Rows
from fmfl_jax.experiment.services import students
from fmfl_jax.experiment.services.arm import Inputs
from fmfl_jax.experiment.services.config import ServicesConfig
from fmfl_jax.experiment.services.data import Corpus, hashed_rows, taken
from fmfl_jax.models.classifiers import Model
from fmfl_jax.services import evaluate as evaluator
from fmfl_jax.services.confidence import auroc

_DRAWS = 1000
_FEW_ROWS, _MANY_ROWS = 50, 5000
_OVERFIT_STEPS, _GOOD_STEPS = 100, 100
_STUDENTS = 12  # of each kind


def evaluate(
    config: ServicesConfig,
    corpus: Corpus,
    model: Model,
    pools: list[Inputs],
    kept: list[dict],
    test: Rows,
    fm_log_probs: np.ndarray,
) -> dict:
    """The figures: students: {arm: one record a seed}; coverage: of each seed's student of the FM (else FedAvg's).
    pools, kept: of all seeds, kept {arm: params} of the students that are looked at. fm_log_probs: [J, K], of the first
    J test rows."""
    num_judged, num_classes = fm_log_probs.shape
    judged = Rows(test.x[:num_judged], test.y[:num_judged])
    fm_labels = fm_log_probs.argmax(axis=1)
    fm_accuracy = float((fm_labels == judged.y).mean())
    num_labelled = min(config.data.num_labelled, num_judged // 3)
    out: dict = {"num_labelled": num_labelled, "fm_accuracy": fm_accuracy, "draws": _DRAWS, "students": {}}
    answer = lambda params: np.asarray(students.predicted(model, params, judged.x)).argmax(axis=1)
    for name in kept[0]:
        each = [answer(own[name]) for own in kept]
        settings = num_labelled, fm_accuracy, num_classes
        out["students"][name] = [_estimates(one, judged.y, fm_labels, *settings) for one in each]
    taught = "distill" if "distill" in kept[0] else "fedavg"
    each = [answer(own[taught]) for own in kept]
    seeds = range(config.seed, config.seed + len(kept))
    out["coverage"] = [
        {"share": coverage(one == judged.y, one == fm_labels, num_labelled, seed)} for one, seed in zip(each, seeds)
    ]
    out["overfitting"] = overfitting_alarm(config, corpus, model, pools, judged, fm_labels)
    return out


def _estimates(answer, truth, fm_labels, num_labelled: int, fm_accuracy: float, num_classes: int) -> dict:
    """Of one student, the first num_labelled rows being the labelled ones."""
    correct, agrees = answer == truth, answer == fm_labels
    known = slice(0, num_labelled)
    ppi = evaluator.prediction_powered_accuracy(correct[known], agrees[known], agrees[num_labelled:])
    labels = evaluator.labelled_accuracy(correct[known])
    agreement = None
    if abs(fm_accuracy - (1 - fm_accuracy) / (num_classes - 1)) > 1e-6:
        agreement = float(evaluator.agreement_accuracy(agrees.mean(), fm_accuracy, num_classes))
    return {
        "true": float(correct.mean()),
        "labelled": labels.value,
        "labelled_width": labels.high - labels.low,
        "ppi": ppi.value,
        "ppi_width": ppi.high - ppi.low,
        "effective_labels": ppi.effective_labels,
        "agreement": float(agrees.mean()),
        "agreement_accuracy": agreement,
    }


def coverage(correct: np.ndarray, agrees: np.ndarray, num_labelled: int, seed: int) -> float:
    """Share of 1,000 draws of labelled and unlabelled rows, with replacement, whose 95 % interval holds the mean of
    `correct`."""
    rng, truth, hits = streams.host_rng(streams.SERVICE_EVALUATION, seed, 0), correct.mean(), 0
    for _ in range(_DRAWS):
        known = rng.integers(len(correct), size=num_labelled)
        others = rng.integers(len(correct), size=len(correct) - num_labelled)
        found = evaluator.prediction_powered_accuracy(correct[known], agrees[known], agrees[others])
        hits += found.low <= truth <= found.high
    return hits / _DRAWS


def overfitting_alarm(
    config: ServicesConfig, corpus: Corpus, model: Model, pools: list[Inputs], judged: Rows, fm_labels: np.ndarray
) -> dict:
    """Students on 50 rows of the pools, 100 epochs, and students on thousands of rows with as many of the pools' among
    them; each is compared with one more good student. The alarm sees agreement with the FM only."""
    data, rate, num_classes = config.data, config.student_lr, len(corpus.classes)
    numbers = np.concatenate([one.data.pool_numbers for one in pools])
    numbers, first = np.unique(numbers, return_index=True)
    answers = np.concatenate([one.fm_pool.log_probs for one in pools]).argmax(axis=1)[first]
    seen = hashed_rows(taken(corpus.train, numbers), data)
    others = np.setdiff1d(np.arange(len(corpus.train.texts)), numbers)
    rng = streams.host_rng(streams.SERVICE_EVALUATION, config.seed, 1)
    most = hashed_rows(taken(corpus.train, rng.permutation(others)[: _MANY_ROWS - len(numbers) // 2]), data)
    few = min(_FEW_ROWS, len(numbers) // 3)

    def agreement(places: np.ndarray, good: bool):
        """The student trained on these pool rows: agrees on them, and on fresh ones."""
        x, y = seen.x[places], seen.y[places]
        if good:
            x, y = np.concatenate([x, most.x]), np.concatenate([y, most.y])
        steps = _GOOD_STEPS if good else _OVERFIT_STEPS
        params = students.fit(model, x, students.log_labels(y, num_classes), np.ones(len(x), np.float32), rate, steps)
        train = np.asarray(students.predicted(model, params, seen.x[places])).argmax(axis=1) == answers[places]
        fresh = np.asarray(students.predicted(model, params, judged.x)).argmax(axis=1) == fm_labels
        return train, fresh

    half = len(numbers) // 2
    reference = agreement(rng.permutation(len(numbers))[:half], True)
    p_values, overfit = [], []
    for good in (False, True):
        for _ in range(_STUDENTS):
            places = rng.permutation(len(numbers))[: half if good else few]
            found = evaluator.overfitting(*agreement(places, good), *reference, rng=rng)
            p_values.append(found.p_value)
            overfit.append(not good)
    p, bad = np.asarray(p_values), np.asarray(overfit)
    return {
        "students": _STUDENTS,
        "few_rows": few,
        "many_rows": half + len(most.y),
        "caught": int((p[bad] < 0.05).sum()),
        "false_alarms": int((p[~bad] < 0.05).sum()),
        "auroc": auroc(-p, bad),
        "p_values": p.tolist(),
        "overfit": bad.tolist(),
    }
