"""Questions with known answers, as data: what a model makes up is found by asking them several times.

The file has examples that stand before every question, questions with the words that a right answer holds, and one
planted falsehood: a claim that stands before its question, which the model then repeats every time. Agreement with
oneself cannot find it.

    >>> asked = read_questions()
    >>> prompts = [prompt(asked, q) for q in asked.questions]
"""

import json
import pathlib
from typing import NamedTuple

from fmfl_jax.services.words import words_of

FOLDER = pathlib.Path(__file__).parent / "questions"


class Question(NamedTuple):
    """question; answers: words of which a right answer holds one; claim: what stands before it, "" for nothing;
    falsehood: words that a planted answer holds, () where none is planted."""

    question: str
    answers: tuple[str, ...]
    claim: str = ""
    falsehood: tuple[str, ...] = ()


class Questions(NamedTuple):
    """before: examples for the form. questions; planted: the one with a false claim before it."""

    before: str
    questions: tuple[Question, ...]
    planted: Question


def read_questions(name: str = "facts") -> Questions:
    """questions/NAME.json. Raises ValueError that names the file for another form."""
    path = FOLDER / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        own = tuple(Question(q["question"], tuple(q["answers"])) for q in content["questions"])
        p = content["planted"]
        planted = Question(p["question"], tuple(p["answers"]), p["claim"], tuple(p["falsehood"]))
        return Questions(content["before"], own, planted)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} holds no questions: {error}") from error


def prompt(asked: Questions, one: Question) -> str:
    """What the model goes on from."""
    return f"{asked.before}{one.claim}Q: {one.question}\nA:"


def first_line(text: str) -> str:
    """The answer of a text that may go on with the next question."""
    return text.strip().split("\n")[0].strip()


def holds(answer: str, words: tuple[str, ...]) -> bool:
    """Whether the answer holds one of these words or phrases, whatever their case."""
    said = " ".join(["", *words_of(answer), ""])
    return any(" ".join(["", *words_of(phrase), ""]) in said for phrase in words)
