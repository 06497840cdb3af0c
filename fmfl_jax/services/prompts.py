"""Prompts for scoring labelled text: templates, label words and examples are data, in one JSON file a task.

    {"classes": ["good", "bad"],
     "templates": [{"name": "plain", "text": "{text}\\nIn one word:", "words": {"good": ["great"], "bad": ["awful"]}}],
     "examples": [{"text": "I would go again.", "label": "good"}]}

    task = load_task("agnews")
    log_probs = score_classes(engine.score, task.template("section"), texts)           # float64 [N, K]

A class's probability is the sum over its words (Schick and Schuetze's verbalizer, EACL 2021, with several words). Words
stand in the file without the space before them: it is put where the template does not end a line. Examples stand before
the text in the same template, each with the first word of its class.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fmfl_jax.services import calibration
from fmfl_jax.services.types import ScoreFn

_TASKS = pathlib.Path(__file__).parent / "tasks"
_BYTES_BESIDE = 8  # tokens that a tokenizer may add to a text's bytes

Chat = Callable[[Sequence[Mapping[str, str]]], str]
"""Messages {"role", "content"} -> the text that the model's chat template makes of them, up to its answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """text has {text} once; words: for each class the words that stand for it. chat: text is a user's message."""

    name: str
    text: str
    words: tuple[tuple[str, ...], ...]
    chat: bool = False

    def __post_init__(self):
        if self.text.count("{text}") != 1:
            raise ValueError(f"template {self.name!r} must hold {{text}} once, got {self.text[:60]!r}")
        if self.text != self.text.rstrip(" \t"):
            raise ValueError(f"template {self.name!r} ends with a space: the space belongs to the label word")
        words = [word for of_class in self.words for word in of_class]
        for word in words:
            if not word.strip() or word != word.strip():
                raise ValueError(f"template {self.name!r}: label word {word!r} is empty or has spaces around it")
            if words.count(word) > 1:
                raise ValueError(f"template {self.name!r}: label word {word!r} stands twice")

    @property
    def continuations(self) -> list[str]:
        """All label words, class by class, as they follow the prompt."""
        space = "" if self.chat or self.text.endswith("\n") else " "
        return [space + word for of_class in self.words for word in of_class]


class Example(NamedTuple):
    """A labelled text in the prompt; label: the class's number."""

    text: str
    label: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskPrompts:
    """A task's file, checked."""

    name: str
    classes: tuple[str, ...]
    templates: tuple[Template, ...]
    examples: tuple[Example, ...] = ()

    def template(self, name: str) -> Template:
        """The template of this name. Raises ValueError that lists the others."""
        for template in self.templates:
            if template.name == name:
                return template
        names = ", ".join(template.name for template in self.templates)
        raise ValueError(f"task {self.name} has no template {name!r}: expected one of {names}")


class TokenLimit(NamedTuple):
    """The longest prompt, in tokens, and the tokenizer's encode and decode."""

    max_tokens: int
    encode: Callable[[str], Sequence[int] | np.ndarray]
    decode: Callable[[Sequence[int]], str]


class TemplateResult(NamedTuple):
    """How well a template does on a few labelled rows; see `choose_template`."""

    template: Template
    raw_accuracy: float
    batch_accuracy: float
    batch_nll: float


def builtin_tasks() -> list[str]:
    """Names of the tasks whose files come with the package."""
    return sorted(path.stem for path in _TASKS.glob("*.json"))


def load_task(name: str | pathlib.Path) -> TaskPrompts:
    """The task of a built-in name or of a JSON file.

    Raises:
      FileNotFoundError: no such name or file.
      ValueError: no JSON, a field missing or unknown, a template without {text}, a class without label words, words or
        examples of a class that is not there.
    """
    path = _TASKS / f"{name}.json" if str(name) in builtin_tasks() else pathlib.Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"task {name}: no such file, and none of {', '.join(builtin_tasks())}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _parse(path.stem, content)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        reason = f"the field {e} is missing" if isinstance(e, KeyError) else str(e)
        raise ValueError(f"{path}: {reason}") from e


def check_labels(task: TaskPrompts, labels) -> None:
    """Raises ValueError where no row of the data, int [N], has one of the task's classes: a misspelt class, or another
    task's file."""
    for number, name in enumerate(task.classes):
        if not np.any(np.asarray(labels) == number):
            raise ValueError(f"class {name!r} of task {task.name} is the label of no row of the data")


def render(template: Template, text: str, *, examples: Sequence[Example] = (), chat: Chat | None = None) -> str:
    """The prompt of one text, with examples before it. Raises ValueError where the template is a chat's and `chat` is
    None: the model has no chat template."""
    before, after = template.text.split("{text}")
    first_words = [words[0] for words in template.words]
    if not template.chat:
        space = "" if template.text.endswith("\n") else " "
        shots = [f"{before}{e.text}{after}{space}{first_words[e.label]}\n\n" for e in examples]
        return "".join(shots) + before + text + after
    if chat is None:
        raise ValueError(f"template {template.name!r} is for a chat, and the model has no chat template")
    messages = []
    for e in examples:
        messages.append({"role": "user", "content": before + e.text + after})
        messages.append({"role": "assistant", "content": first_words[e.label]})
    return chat([*messages, {"role": "user", "content": before + text + after}])


def render_all(
    template: Template,
    texts: Sequence[str],
    *,
    examples: Sequence[Example] = (),
    chat: Chat | None = None,
    limit: TokenLimit | None = None,
) -> tuple[list[str], int]:
    """The prompts of all texts, and how many texts were cut to the limit.

    A prompt over the limit loses tokens from the middle of its text: the beginning says what it is about, the end
    stands beside the question. Nothing but the text is cut. Raises ValueError where the prompt is too long without it.
    """
    prompts, num_cut = [], 0
    for text in texts:
        prompt = render(template, text, examples=examples, chat=chat)
        if limit is not None and len(prompt.encode("utf-8")) + _BYTES_BESIDE > limit.max_tokens:
            fill = lambda shorter: render(template, shorter, examples=examples, chat=chat)
            fitted = _fit(template.name, text, fill, limit)
            num_cut += fitted != prompt
            prompt = fitted
        prompts.append(prompt)
    return prompts, num_cut


def score_classes(
    score: ScoreFn,
    template: Template,
    texts: Sequence[str],
    *,
    examples: Sequence[Example] = (),
    chat: Chat | None = None,
    limit: TokenLimit | None = None,
) -> np.ndarray:
    """float64 [N, K]: log of the sum of the probabilities of each class's words after each text (not normalized)."""
    prompts, _ = render_all(template, texts, examples=examples, chat=chat, limit=limit)
    return sum_words(score(prompts, template.continuations), template)


def choose_template(
    score: ScoreFn,
    task: TaskPrompts,
    texts: Sequence[str],
    labels,
    *,
    examples: Sequence[Example] = (),
    chat: Chat | None = None,
    limit: TokenLimit | None = None,
) -> list[TemplateResult]:
    """The task's templates on a few public labelled rows (labels int [N]), the best first: by the batch-calibrated
    likelihood of the labels, which tells more of a few rows than their accuracy. Chat templates count where `chat` is
    given. Raises ValueError where none is left."""
    results = []
    for template in task.templates:
        if template.chat and chat is None:
            continue
        rows = score_classes(score, template, texts, examples=examples, chat=chat, limit=limit)
        even = calibration.batch(rows)
        raw_accuracy, batch_accuracy = (calibration.accuracy(scores, labels) for scores in (rows, even))
        results.append(TemplateResult(template, raw_accuracy, batch_accuracy, calibration.nll(even, labels)))
    if not results:
        raise ValueError(f"task {task.name} has chat templates only, and the model has no chat template")
    return sorted(results, key=lambda result: result.batch_nll)


def named_class(template: Template, answer: str) -> int | None:
    """The class whose word stands first in an answer in words; None where none does."""
    places = []
    for label, words in enumerate(template.words):
        for word in words:
            found = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE)
            places += [] if found is None else [(found.start(), label)]
    return min(places)[1] if places else None


def sum_words(log_probs, template: Template) -> np.ndarray:
    """Scores of words [N, W], in the order of `continuations`, -> of classes float64 [N, K]."""
    log_probs = np.asarray(log_probs, np.float64)
    ends = np.cumsum([0, *map(len, template.words)])
    parts = [np.logaddexp.reduce(log_probs[:, a:b], axis=1) for a, b in zip(ends, ends[1:])]
    return np.stack(parts, axis=1)


def _fit(name: str, text: str, fill: Callable[[str], str], limit: TokenLimit) -> str:
    count = lambda prompt: len(limit.encode(prompt))
    prompt = fill(text)
    ids = [int(i) for i in limit.encode(text)]
    kept = len(ids)
    while (over := count(prompt) - limit.max_tokens) > 0:
        kept -= over
        if kept < 1:
            raise ValueError(
                f"template {name!r} with its examples has {count(fill(''))} tokens without the text; "
                f"the limit is {limit.max_tokens}"
            )
        head, tail = limit.decode(ids[: kept - kept // 2]), limit.decode(ids[len(ids) - kept // 2 :])
        prompt = fill(head.rstrip("\ufffd") + tail.lstrip("\ufffd"))  # half a character at the cut
    return prompt


def _parse(name: str, content: dict) -> TaskPrompts:
    _only(content, "the task", ("classes", "templates", "examples"))
    classes = tuple(content["classes"])
    if len(classes) < 2 or len(set(classes)) != len(classes) or not all(isinstance(c, str) for c in classes):
        raise ValueError(f"classes must be at least two different names, got {list(classes)}")
    templates = []
    for entry in content["templates"]:
        _only(entry, "a template", ("name", "text", "words", "chat"))
        _only(entry["words"], f"template {entry['name']!r}: words", classes)
        for of_class in classes:
            words = entry["words"].get(of_class)
            if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
                raise ValueError(f"template {entry['name']!r}: class {of_class!r} has no list of label words")
        words = tuple(tuple(entry["words"][of_class]) for of_class in classes)
        templates.append(Template(name=entry["name"], text=entry["text"], words=words, chat=entry.get("chat", False)))
    if not templates or len({template.name for template in templates}) != len(templates):
        raise ValueError("templates must be at least one, each with a name of its own")
    examples = []
    for entry in content.get("examples", []):
        _only(entry, "an example", ("text", "label"))
        if entry["label"] not in classes:
            raise ValueError(f"an example's label {entry['label']!r} is none of {', '.join(classes)}")
        examples.append(Example(entry["text"], classes.index(entry["label"])))
    return TaskPrompts(name=name, classes=classes, templates=tuple(templates), examples=tuple(examples))


def _only(entry: dict, what: str, fields: Sequence[str]) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{what} must be an object, got {str(entry)[:60]!r}")
    unknown = [field for field in entry if field not in fields]
    if unknown:
        raise ValueError(f"{what} has an unknown field {unknown[0]!r}: expected {', '.join(fields)}")
