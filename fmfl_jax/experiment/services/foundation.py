"""The foundation model as the federation sees it: functions that label and write texts, and what they cost.

Whoever holds a model fills in a FoundationModel (launch/fm_services.py does it from a checkpoint). Without one, the
built-in task is answered by `keyword_rules`: a list of common words for each topic. It is no foundation model, it shows
the flow without a download.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from fmfl_jax.services import calibration
from fmfl_jax.services.augment import first_of_near_duplicates, long_enough
from fmfl_jax.services.placement import ModelSize
from fmfl_jax.services.words import words_of

_KEYWORDS = {
    "weather": "rain snow wind storm fog hail frost sunshine thunder skies ice",
    "cooking": "soup rice salad pasta sauce garlic butter pepper salt lemon stew",
    "sports": "match goal season penalty final race tournament tackle overtime set",
    "travel": "train hotel airport ferry flight taxi station border coast bus",
}
_VOTE_OF_NOBODY = 0.1


class FoundationModel(NamedTuple):
    """name: what answers, for people. score(texts) -> float64 [N, K], log-scores of the classes, not calibrated; None
    where an API gives text alone. vote(texts) -> float64 [N, K], how often its words named each class; a row of 0 where
    they named none. write(label, count, seed) -> texts of that class; complete(prompts, seed, max_new_tokens) -> what
    follows them; None where it writes none. tokens(text) -> how many it reads for one text, the prompt's own included.
    tune: None where it cannot be tuned. size: of the model, for costs."""

    name: str
    score: Callable[[Sequence[str]], np.ndarray] | None
    write: Callable[[int, int, int], list[str]] | None
    tokens: Callable[[str], int]
    size: ModelSize
    output_tokens: int = 30
    vote: Callable[[Sequence[str]], np.ndarray] | None = None
    complete: Callable[[Sequence[str], int, int], list[str]] | None = None
    tune: "Tune | None" = None


class Tune(Protocol):
    def __call__(
        self, texts: Sequence[str], targets: np.ndarray, offset: np.ndarray, /, *, num_steps: int, seed: int
    ) -> FoundationModel:
        """The same model with a LoRA tuned to label so, targets float [N, K], which may be tuned again. offset: float
        [K], added to the scores meanwhile: what they need to fit the prior of these texts."""
        ...


class Answers(NamedTuple):
    """log_probs: float64 [N, K], calibrated, of texts. mean_tokens: that the FM reads for a text. log_prior: float64
    [1, K], what was subtracted from the scores; 0 where the FM gives words alone."""

    log_probs: np.ndarray
    mean_tokens: int
    log_prior: np.ndarray


def answers(
    fm: FoundationModel, texts: Sequence[str], temperature: float = 1.0, *, log_prior: np.ndarray | None = None
) -> Answers:
    """The FM's labels of a pool: batch-calibrated (Zhou et al., ICLR 2024), which needs no labels, at a temperature
    that a few labelled rows gave. log_prior: of another batch, for texts that are to be compared with it. Words alone
    are counted, a tenth of a vote added to every class: a text without an answer has equal probabilities.

    Raises ValueError for scores that are not finite: none reaches a student.
    """
    tokens = max(1, round(float(np.mean([fm.tokens(text) for text in texts[:50]]))))
    if fm.score is None:
        assert fm.vote is not None
        log_probs = np.log(fm.vote(texts) + _VOTE_OF_NOBODY)
        log_prior = np.zeros((1, log_probs.shape[1]))
    else:
        log_probs = fm.score(texts)
        log_prior = calibration.log_prior(log_probs) if log_prior is None else log_prior
    even = calibration.raw(calibration.raw(log_probs) - log_prior)
    return Answers(calibration.with_temperature(even, temperature), tokens, log_prior)


class Written(NamedTuple):
    """Texts that the FM wrote and that passed the filters; labels: int64 [n], those asked for; num_asked: before the
    filters."""

    texts: list[str]
    labels: np.ndarray
    num_asked: int


def written(fm: FoundationModel, num_classes: int, count: int, seed: int) -> Written:
    """About count texts, equally many asked of each class, without short texts and near duplicates (as they come out
    else: what their labels are worth is the arms' question). Raises ValueError for an FM that writes none."""
    if fm.write is None:
        raise ValueError(f"services=generate needs a model that writes, and {fm.name} does not: give a checkpoint")
    each = max(1, count // num_classes)
    texts, labels = [], []
    for label in range(num_classes):
        texts += [" ".join(text.split()) for text in fm.write(label, each, seed)]
        labels += [label] * each
    kept = np.flatnonzero(long_enough(texts) & first_of_near_duplicates(texts))
    if len(kept) < num_classes:
        raise ValueError(f"{fm.name} wrote {len(texts)} texts, of which {len(kept)} are neither short nor alike")
    return Written([texts[i] for i in kept], np.asarray(labels)[kept], len(texts))


def in_words(fm: FoundationModel) -> FoundationModel:
    """The same model behind an API that says a class's name and nothing else; of equal scores it names none."""
    score = fm.score
    assert score is not None

    def vote(texts):
        scores = score(texts)
        best = scores == scores.max(axis=1, keepdims=True)
        return np.where(best.sum(axis=1, keepdims=True) == 1, best, 0).astype(np.float64)

    return fm._replace(name=f"{fm.name}, in words", score=None, vote=vote)


def keyword_rules(classes: Sequence[str]) -> FoundationModel:
    """The built-in task's scorer: a class's score is the number of its common words in the text. Raises ValueError for
    classes of another task."""
    unknown = [name for name in classes if name not in _KEYWORDS]
    if unknown:
        raise ValueError(f"the built-in rules know no class {unknown[0]!r}: give a checkpoint")
    lists = [set(_KEYWORDS[name].split()) for name in classes]

    def score(texts):
        return np.asarray([[float(sum(word in known for word in words_of(text))) for known in lists] for text in texts])

    def tokens(text):
        return max(1, len(words_of(text)))

    return FoundationModel(
        "keyword rules (built in, no model)", score, None, tokens, ModelSize(num_params=1e6, weight_bytes=1e6)
    )
