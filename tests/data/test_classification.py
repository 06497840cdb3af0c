"""Tasks from seeds, and the reader of labelled text."""

import numpy as np
import pytest

from fmfl_jax.data.classification import (
    LabelledText,
    hashed_ngrams,
    image_task,
    linear_task,
    read_labelled_text,
    text_task,
)


def test_linear_task_is_the_one_defined():
    task = linear_task(40, num_features=30, num_test=500, seed=1)
    sizes = task.shards.sizes
    assert len(sizes) == 40 and sizes.min() >= 10 and sizes.max() <= 300 and sizes.sum() == len(task.train.y)
    assert np.array_equal(task.shards.rows, np.arange(len(task.train.y)))
    for rows in (task.train, task.test):
        assert (
            rows.x.dtype == np.float32 and 0.18 < (rows.x > 0).mean() < 0.22 and rows.x.min() >= 0 and rows.x.max() < 1
        )
    # One teacher for all: least squares on the clients' rows tells the test rows' classes far better than chance.
    fit, *_ = np.linalg.lstsq(task.train.x, np.eye(10, dtype=np.float32)[task.train.y], rcond=None)
    assert ((task.test.x @ fit).argmax(axis=1) == task.test.y).mean() > 0.35
    assert np.array_equal(linear_task(40, num_features=30, seed=1).train.x, task.train.x)


def test_image_task_has_skewed_clients_and_classes_that_differ():
    task = image_task(20, num_rows=2000, alpha=0.1, image_size=12, num_test=100)
    assert task.train.x.shape == (2000, 12, 12, 1) and sorted(task.shards.rows) == list(range(2000))
    shares = [
        np.bincount(task.train.y[task.shards.rows[a:b]], minlength=10).max() / (b - a)
        for a, b in zip(task.shards.starts, task.shards.starts[1:])
    ]
    assert np.mean(shares) > 0.4  # a tenth each, were they not skewed
    means = np.stack([task.train.x[task.train.y == k].mean(axis=0) for k in range(10)])
    assert np.std(means, axis=0).mean() > 0.15  # noise alone gives 1 / sqrt(200) = .07


def test_ngrams_are_words_then_pairs_by_a_fixed_hash():
    ids = hashed_ngrams(["The cat, the CAT", "...", "a b c d"], num_buckets=1000, max_ngrams=6)
    assert ids.shape == (3, 6) and ids.dtype == np.int32
    assert ids[0, 0] == ids[0, 2] and ids[0, 1] == ids[0, 3]  # the, cat, the, cat
    assert ids[0, 4] != ids[0, 5] and not set(ids[0, 4:]) & set(ids[0, :4])  # the cat, cat the
    assert not ids[1].any() and ids[2].all() and ids.max() < 1000
    assert hashed_ngrams(["123456789"], num_buckets=2**31 - 1, max_ngrams=1)[0, 0] == 1 + 0xCBF43926 % (2**31 - 2)


def test_every_client_has_a_text():
    text = LabelledText([f"word{i} text" for i in range(60)], np.arange(60, dtype=np.int32) % 4)
    task = text_task(text, text, 50, alpha=0.1, num_buckets=64, max_ngrams=4, seed=0)
    assert task.shards.sizes.min() >= 1 and sorted(task.shards.rows) == list(range(60))
    with pytest.raises(ValueError, match="61 clients but only 60"):
        text_task(text, text, 61, alpha=0.1, num_buckets=64, max_ngrams=4, seed=0)


def test_reader_takes_every_line(tmp_path):
    path = tmp_path / "news.tsv"
    path.write_bytes("Caf\u00e9 \u2028 opens\tBusiness\nA goal\tSports".encode())  # U+2028 is no end of a line here
    read = read_labelled_text(path)
    assert read.texts == ["Caf\u00e9 \u2028 opens", "A goal"] and read.labels.tolist() == [2, 1]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"fine\tSports\nno label here\n", r"line 2: expected text<TAB>label, got 'no label here'"),
        (b"a\tb\tSports\n", "line 1: expected text<TAB>label"),
        (b"fine\tSports\n\nmore\tWorld\n", "line 2: expected"),
        (b"  \tSports\n", "line 1: expected"),
        (b"fine\tSports\nmore\tsports\n", "line 2: label 'sports' is none of World, Sports, Business, Sci/Tech"),
        (b"", "no lines"),
        (b"caf\xe9\tSports\n", "not UTF-8"),
    ],
)
def test_reader_names_file_and_line(tmp_path, content, message):
    path = tmp_path / "news.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_labelled_text(path)
    assert str(path) in str(caught.value)


def test_ag_news_as_published(shared_data):
    read = read_labelled_text(shared_data / "agnews" / "test.tsv")
    assert np.bincount(read.labels).tolist() == [1900] * 4


def test_reader_of_named_columns_and_json(tmp_path):
    table, lines = tmp_path / "news.tsv", tmp_path / "news.jsonl"
    table.write_text("id\tbody\tkind\n1\tA goal\tb\n2\tRain\ta\n", encoding="utf-8")
    named = dict(text_column="body", label_column="kind")
    read = read_labelled_text(table, ("a", "b"), **named)
    assert read.texts == ["A goal", "Rain"] and read.labels.tolist() == [1, 0]
    lines.write_text('{"body": "A\\tgoal", "kind": "b", "x": 1}\n{"body": "Rain", "kind": 0}\n', encoding="utf-8")
    read = read_labelled_text(lines, ("a", "b"), **named)
    assert read.texts == ["A\tgoal", "Rain"] and read.labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="line 1: expected a JSON object with a text 'text' and a label 'label'"):
        read_labelled_text(lines, ("a", "b"))
    with pytest.raises(ValueError, match="line 1: label 'b' is none of a, c"):
        read_labelled_text(lines, ("a", "c"), **named)
    with pytest.raises(ValueError, match="names no column 'label' .or two., but id, body, kind"):
        read_labelled_text(table, ("a", "b"), text_column="body", label_column="label")
    with pytest.raises(ValueError, match="name both columns"):
        read_labelled_text(table, ("a", "b"), text_column="body")
    table.write_text("id\tbody\tkind\n1\tA goal\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: expected 3 cells"):
        read_labelled_text(table, ("a", "b"), **named)
    lines.write_text('{"text": "Rain", "label": 2}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: label 2 is none of a, b"):
        read_labelled_text(lines, ("a", "b"))
