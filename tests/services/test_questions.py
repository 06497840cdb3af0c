"""Questions as data: right answers are found in what is said, other files are refused."""

import pytest

from fmfl_jax.services import questions


def test_the_built_in_questions():
    asked = questions.read_questions()
    assert len(asked.questions) == 16 and len({one.question for one in asked.questions}) == 16
    assert all(one.answers and not one.claim for one in asked.questions)
    assert asked.planted.falsehood and asked.planted.claim.endswith("\n")
    text = questions.prompt(asked, asked.planted)
    assert text.startswith(asked.before + asked.planted.claim) and text.endswith(
        "Q: " + asked.planted.question + "\nA:"
    )


def test_answers_are_whole_words_in_any_case():
    assert questions.holds("It is paris.", ("Paris",)) and questions.holds("Carbon  Dioxide!", ("carbon dioxide",))
    assert not questions.holds("Parisians", ("Paris",)) and not questions.holds("", ("Paris",))
    assert questions.holds("8", ("8", "eight")) and not questions.holds("18", ("8",))
    assert questions.first_line(" Paris \nQ: more") == "Paris" and questions.first_line("") == ""


@pytest.mark.parametrize("content", ["[]", "{", '{"before": "", "questions": [], "planted": {}}'])
def test_another_form_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "FOLDER", tmp_path)
    (tmp_path / "facts.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="facts.json holds no questions"):
        questions.read_questions()
