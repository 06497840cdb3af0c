"""Prompts: the files that ship, what is refused, cutting, and the choice of a template."""

import json

import numpy as np
import pytest

from fmfl_jax.data.tokenizers import byte_tokenizer
from fmfl_jax.data.topics import TOPICS
from fmfl_jax.services import prompts
from fmfl_jax.services.types import GenerateRequest, ScoreRequest, ScoreResponse, needs_logits

GOOD = {
    "classes": ["good", "bad"],
    "templates": [
        {"name": "plain", "text": "{text}\nIn a word:", "words": {"good": ["great", "fine"], "bad": ["awful"]}},
        {"name": "chat", "text": "Rate {text}", "chat": True, "words": {"good": ["Good"], "bad": ["Bad"]}},
    ],
    "examples": [{"text": "I {would} go again.", "label": "good"}],
}
BYTES = byte_tokenizer()


def loaded(tmp_path, **changes):
    path = tmp_path / "task.json"
    path.write_text(json.dumps(GOOD | changes), encoding="utf-8")
    return prompts.load_task(path)


def test_files_that_ship():
    assert prompts.builtin_tasks() == ["agnews", "topics"]
    agnews, topics = map(prompts.load_task, prompts.builtin_tasks())
    assert agnews.classes == ("World", "Sports", "Business", "Sci/Tech") and topics.classes == TOPICS
    section = agnews.template("section")
    end = "\n\nThis article was published in the newspaper section on"
    assert prompts.render(section, "A {b}.") == "A {b}." + end
    assert section.continuations == [" politics", " sports", " business", " technology"]
    for task in (agnews, topics):
        assert sorted(example.label for example in task.examples) == [0, 1, 2, 3]


def test_examples_and_chats(tmp_path):
    task = loaded(tmp_path)
    plain, chat = task.templates
    assert (
        prompts.render(plain, "No.", examples=task.examples)
        == "I {would} go again.\nIn a word: great\n\nNo.\nIn a word:"
    )
    asked = []
    prompts.render(chat, "No.", examples=task.examples, chat=lambda messages: asked.extend(messages) or "")
    assert [m["content"] for m in asked] == ["Rate I {would} go again.", "Good", "Rate No."]
    assert [m["role"] for m in asked] == ["user", "assistant", "user"] and chat.continuations == ["Good", "Bad"]
    with pytest.raises(ValueError, match="template 'chat' is for a chat, and the model has no chat template"):
        prompts.render(chat, "No.")


def template(**changes):
    return {"templates": [GOOD["templates"][0] | changes]}


@pytest.mark.parametrize(
    "changes, message",
    [
        (template(text="no place"), r"template 'plain' must hold \{text\} once"),
        (template(text="{text} {text}"), "once"),
        (template(text="{text}: "), "ends with a space"),
        (template(words={"good": ["great"]}), "class 'bad' has no list of label words"),
        (template(words={"good": ["great"], "bad": []}), "class 'bad' has no list of label words"),
        (template(words={"good": ["great"], "bad": "awful"}), "class 'bad' has no list of label words"),
        (template(words={"good": ["great"], "bad": ["great"]}), "label word 'great' stands twice"),
        (template(words={"good": ["great"], "bad": [" "]}), "is empty or has spaces"),
        (template(words={"good": ["great"], "bad": ["awful"], "ugly": ["ugly"]}), "unknown field 'ugly'"),
        (template(word="x"), "a template has an unknown field 'word'"),
        ({"examples": [{"text": "x", "label": "ugly"}]}, "label 'ugly' is none of good, bad"),
        ({"classes": ["good"]}, "at least two different names"),
        ({"templates": [{"name": "x", "words": {"good": ["a"], "bad": ["b"]}}]}, "the field 'text' is missing"),
        ({"templates": []}, "at least one"),
    ],
)
def test_refusals_name_the_file(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        loaded(tmp_path, **changes)
    assert "task.json" in str(caught.value) and "\n" not in str(caught.value)


def test_other_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file, and none of agnews, topics"):
        prompts.load_task("ag_news")
    (tmp_path / "x.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="x.json"):
        prompts.load_task(tmp_path / "x.json")
    task = loaded(tmp_path)
    with pytest.raises(ValueError, match="expected one of plain, chat"):
        task.template("none")
    prompts.check_labels(task, np.asarray([1, 0]))
    with pytest.raises(ValueError, match="class 'bad' of task task is the label of no row"):
        prompts.check_labels(task, np.asarray([0, 0]))
    with pytest.raises(ValueError, match="the teacher needs the foundation model's logits"):
        needs_logits(None, "the teacher")


def test_long_texts_lose_their_middle(tmp_path):
    plain = loaded(tmp_path).templates[0]
    limit = prompts.TokenLimit(30, BYTES.encode, BYTES.decode)
    texts = ["short", "b" + "x" * 50 + "e", "caf\u00e9" * 30]
    made, num_cut = prompts.render_all(plain, texts, limit=limit)
    assert num_cut == 2 and made[0] == "short\nIn a word:"
    assert len(BYTES.encode(made[1])) == 30
    assert made[1].startswith("bx") and made[1].endswith("xe\nIn a word:")
    assert "\ufffd" not in made[2] and len(BYTES.encode(made[2])) <= 30 and made[2].startswith("caf\u00e9")
    with pytest.raises(ValueError, match="'plain' with its examples has 11 tokens without the text; the limit is 11"):
        prompts.render_all(plain, ["long enough"], limit=limit._replace(max_tokens=11))


def test_classes_sum_their_words_and_the_better_template_is_chosen(tmp_path):
    task = loaded(tmp_path)
    plain = task.templates[0]
    rows = np.log([[0.1, 0.2, 0.3]])
    np.testing.assert_allclose(np.exp(prompts.sum_words(rows, plain)), [[0.3, 0.3]])

    def score(texts, words):
        """The chat's words follow the text, the plain template's do not; both prefer the first class."""
        good = np.asarray(["yes" in text for text in texts])[:, None] * ("Good" in words)
        return np.broadcast_to(np.where(good, [0.0, -3.0], [0.0, -1.0]), (len(texts), 2))

    two = dict(words={"good": ["great"], "bad": ["awful"]})
    task = loaded(tmp_path, templates=[GOOD["templates"][0] | two, GOOD["templates"][1]])
    texts, labels = ["yes", "no", "yes, yes", "not"], np.asarray([0, 1, 0, 1])
    best, other = prompts.choose_template(score, task, texts, labels, chat=lambda m: m[-1]["content"])
    assert best.template.name == "chat" and (best.raw_accuracy, best.batch_accuracy) == (0.5, 1.0)
    assert other.batch_nll > best.batch_nll
    [only] = prompts.choose_template(score, task, texts, labels)
    assert only.template.name == "plain"


def test_payloads():
    request = ScoreRequest(texts=("caf\u00e9", "ab"), words=(" x", " y"))
    assert request.payload_bits == 8 * (5 + 2 + 4)
    assert ScoreRequest(texts=("caf\u00e9", "ab"), words=(" x",), ids=(7, 8)).payload_bits == 8 * 2 + 64
    assert ScoreResponse(log_probs=np.zeros((2, 4)), bits_per_value=8).payload_bits == 64
    assert GenerateRequest(prompts=("abc",), max_new_tokens=4).payload_bits == 24
    with pytest.raises(ValueError, match="1 ids for 2 texts"):
        ScoreRequest(texts=("a", "b"), words=("x",), ids=(1,))


def test_the_class_an_answer_names_first():
    template = prompts.Template(name="t", text="{text}:", words=(("good", "very good"), ("bad",), ("Sci/Tech",)))
    said = ["Bad, not good", "GOOD.", "goodness", "It is sci/tech news", "", "so very good, not bad"]
    assert [prompts.named_class(template, one) for one in said] == [1, 0, None, 2, None, 0]
