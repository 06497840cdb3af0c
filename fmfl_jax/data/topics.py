"""Labelled text without a download: short notes on four topics, made from a seed.

    train, test = topic_texts(400, 200, seed=0)
    train.texts[0], TOPICS[train.labels[0]]        # ("Bring a coat. Stir the soup slowly. ...", "cooking")

A note has three sentences. Each is about the note's topic, about another one, or about nothing in particular, so that
a bag of words learns most notes and not all: of some, no sentence is about their topic.
"""

import numpy as np

from fmfl_jax import streams
from fmfl_jax.data.classification import LabelledText

TOPICS = ("weather", "cooking", "sports", "travel")
_NUM_SENTENCES = 3
_OWN, _OTHER = 0.5, 0.25  # of a sentence; the rest says nothing

_OPENINGS = ("", "Today ", "As expected, ", "In the end ", "This time ", "Later on ", "For once ", "Once again ")
_FRAMES = {
    "weather": ("the {a} brought {b}", "{b} followed the {a}", "they warn of {b} after the {a}"),
    "cooking": ("she put the {a} beside the {b}", "the {a} needs more {b}", "we served the {b} with {a}"),
    "sports": ("the {a} decided the {b}", "the {b} began with a {a}", "a {a} ended their {b}"),
    "travel": ("the {a} took us to the {b}", "we left the {b} by {a}", "they missed the {a} near the {b}"),
}
_WORDS = {
    "weather": (
        ("storm", "cold front", "east wind", "heat wave", "thunder", "low pressure", "frost", "monsoon", "blizzard"),
        ("heavy rain", "fog", "sunshine", "snow", "hail", "drizzle", "clear skies", "ice", "gusts", "sleet"),
    ),
    "cooking": (
        ("soup", "dough", "rice", "roast", "salad", "stew", "sauce", "pasta", "omelette", "curry"),
        ("garlic", "butter", "pepper", "olive oil", "onions", "basil", "flour", "lemon", "cheese", "salt"),
    ),
    "sports": (
        ("penalty", "late goal", "sprint", "knockout", "home run", "tackle", "serve", "overtime", "free throw"),
        ("match", "season", "final", "tournament", "race", "derby", "championship", "cup tie", "set", "relay"),
    ),
    "travel": (
        ("train", "ferry", "night bus", "flight", "taxi", "cable car", "rental car", "tram", "cruise ship"),
        ("airport", "hotel", "old town", "border", "coast", "museum", "island", "station", "campsite", "harbour"),
    ),
}
_PLAIN = (
    "nobody had planned it that way",
    "the neighbours talked about it for days",
    "it was over sooner than we thought",
    "my sister took a few pictures",
    "there was not much time left",
    "everyone was tired but happy",
    "it cost more than last year",
    "the others only heard of it later",
    "we wrote it down at once",
    "nothing else happened before lunch",
)


def topic_texts(num_train: int, num_test: int, *, seed: int) -> tuple[LabelledText, LabelledText]:
    """Training and test notes with labels int32, places in TOPICS, about equally many of each. Each part is drawn
    after the other from one stream: the training notes do not depend on num_test."""
    rng = streams.host_rng(streams.NOTES, seed)
    return _notes(num_train, rng), _notes(num_test, rng)


def _notes(count: int, rng: np.random.Generator) -> LabelledText:
    labels = rng.permutation(np.arange(count) % len(TOPICS)).astype(np.int32)
    return LabelledText([_note(int(label), rng) for label in labels], labels)


def _note(label: int, rng: np.random.Generator) -> str:
    sentences = []
    for kind in rng.random(_NUM_SENTENCES):
        if kind >= _OWN + _OTHER:
            body = _pick(rng, _PLAIN)
        else:
            topic = label if kind < _OWN else (label + int(rng.integers(1, len(TOPICS)))) % len(TOPICS)
            name = TOPICS[topic]
            first, second = _WORDS[name]
            body = _pick(rng, _FRAMES[name]).format(a=_pick(rng, first), b=_pick(rng, second))
        sentence = _pick(rng, _OPENINGS) + body
        sentences.append(sentence[0].upper() + sentence[1:] + ".")
    return " ".join(sentences)


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]
