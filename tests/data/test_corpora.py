"""Reading and splitting text, and the errors of bad input."""

import numpy as np
import pytest

from fmfl_jax.data import corpora

WIKI = (
    " \n = First = \n \n Text . \n \n = = Section = = \n \n a formula \n = 1 and C = \n 2 . \n \n = D = \n 3 . \n \n \n"
    " = Second ( film ) = \n \n Text . \n \n = = = Deeper = = = \n \n end \n"
)


@pytest.mark.parametrize("text", [WIKI, "\n" + WIKI, WIKI.removeprefix(" \n"), WIKI.replace("\n \n", "\n\n")])
def test_wikitext_is_cut_at_titles_only(tmp_path, text):
    (tmp_path / "wiki.test.tokens").write_text(text)
    documents = corpora.load_documents(tmp_path / "wiki.test.tokens")
    assert len(documents) == 2 and "".join(documents) == text
    assert documents[1].startswith(" = Second ( film ) = \n")


def test_folder_formats_and_order(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "j1"}\n\n{"text": "j2", "id": 3}\n')
    (tmp_path / "a.txt").write_bytes("\ufeffp1\r\n\r\np2 é\r\n".encode())
    (tmp_path / "b.md").write_text("# title\n<|endoftext|>\n s2\n<|endoftext|>\n")
    (tmp_path / "d.raw").write_text(" = T = \n \n x \n")
    (tmp_path / "ignored.py").write_text("x")
    expected = ["p1\n\np2 é\n", "# title", "s2", "j1", "j2", " = T = \n \n x \n"]
    assert corpora.load_documents(tmp_path) == expected


def test_labeled_tsv(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("b text\tSports\nwith\ttab\tArts\nc\tSports\n")
    texts, labels, names = corpora.load_labeled_tsv(path)
    assert texts == ["b text", "with\ttab", "c"] == corpora.load_documents(path)
    assert labels.tolist() == [1, 0, 1] and labels.dtype == np.int32 and names == ["Arts", "Sports"]
    path.write_text("a\tSports\nno label\n")
    with pytest.raises(ValueError, match="x.tsv, line 2"):
        corpora.load_labeled_tsv(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: the text is empty"),
        ("a.txt", b" \n\t\r\n", "a.txt: the text is empty"),
        ("a.txt", b"<|endoftext|>\n<|endoftext|>", "a.txt: only"),
        ("a.txt", b"caf\xe9 au lait", r"a.txt: not UTF-8 text \(byte 3 is 0xe9"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}', "a.jsonl, line 2: expected"),
        ("a.jsonl", b'{"text": "x"', "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b'{"text": ""}', "a.jsonl: every"),
    ],
)
def test_bad_text_names_the_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=message):
            corpora.load_documents(path)


def test_missing_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        corpora.load_documents(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match=r"\*\.txt"):
        corpora.load_documents(tmp_path)


def test_python_topics_do_not_repeat():
    """No two halves share more than single paragraphs: what is evaluated was not trained on."""
    documents = corpora.python_topics()
    assert len(documents) > 40 and sum(map(corpora.num_bytes, documents)) > 300_000
    for seed in range(5):
        first, second = corpora.split_documents(documents, 0.5, seed)
        seen = {" ".join(paragraph.split()) for document in first for paragraph in document.split("\n\n")}
        paragraphs = [" ".join(p.split()) for document in second for p in document.split("\n\n")]
        assert sum(len(p) for p in paragraphs if p in seen) < 0.03 * sum(map(len, paragraphs))


def test_split_documents():
    documents = corpora.python_topics()
    total = sum(map(corpora.num_bytes, documents))
    for seed in range(5):
        first, second = corpora.split_documents(documents, 0.5, seed)
        assert sorted(first + second) == sorted(documents)
        assert 0 <= total / 2 - sum(map(corpora.num_bytes, first)) < min(map(corpora.num_bytes, second))
        assert (first, second) == corpora.split_documents(documents, 0.5, seed)
        assert first == [d for d in documents if d in first]
    assert first != corpora.split_documents(documents, 0.5, seed + 1)[0]
    assert corpora.split_documents(["a" * 100, "b"], 0.5, 0) == (["b"], ["a" * 100])
    assert corpora.split_documents(["aaa", "bbbb"], 0.1, 0) == (["aaa"], ["bbbb"])
    for bad in [(["a"], 0.5), (["a", "b"], 1.0)]:
        with pytest.raises(ValueError):
            corpora.split_documents(*bad, 0)


def test_real_files(shared_data):
    """Article counts are WikiText-2's published 600 / 60 / 60; nothing is lost; counts of the others by grep."""
    for name, articles in [("train.tokens", 600), ("valid.tokens", 60), ("test.tokens", 60), ("test.raw", 60)]:
        path = shared_data / f"wikitext2/wiki.{name}"
        documents = corpora.load_documents(path)
        assert len(documents) == articles
        assert sum(map(corpora.num_bytes, documents)) == path.stat().st_size
    assert len(corpora.load_documents(shared_data / "tinystories")) == 2317
    assert len(corpora.load_documents(shared_data / "shakespeare")) == 1
    texts, labels, names = corpora.load_labeled_tsv(shared_data / "agnews/test.tsv")
    assert len(texts) == 7600 and names == ["Business", "Sci/Tech", "Sports", "World"]
    assert np.bincount(labels).tolist() == [1900] * 4
