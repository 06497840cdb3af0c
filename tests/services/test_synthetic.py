"""The synthetic set: balance, a hash that finds every change, files that come back as they were."""

import hashlib
import json

import numpy as np
import pytest

from fmfl_jax.services import synthetic as s

CLASSES = ("world", "sports")
TEXTS = ["a", "b\nline", 'c \u2028 é "q"', "d", "e"]


def made(version=3):
    return s.balanced(TEXTS, [1, 1, 0, 1, 0], classes=CLASSES, per_class=2, version=version)


def test_balanced_in_turn():
    found = made()
    assert found.texts == (TEXTS[2], "a", "e", TEXTS[1]) and found.labels == (0, 1, 0, 1)
    np.testing.assert_array_equal(s.class_counts(found), [2, 2])
    with pytest.raises(ValueError, match="per_class is 3, but there are only {'world': 2}"):
        s.balanced(TEXTS, [1, 1, 0, 1, 0], classes=CLASSES, per_class=3, version=0)


def test_saved_and_loaded(tmp_path):
    found = made()
    s.save(found, tmp_path / "set")
    assert s.load(tmp_path / "set") == found
    size = sum(path.stat().st_size for path in (tmp_path / "set").iterdir())
    assert s.payload_bits(found) == 8 * size
    manifest = json.loads((tmp_path / "set" / s.MANIFEST).read_text())
    assert manifest["version"] == 3 and manifest["counts"] == [2, 2] and manifest["sha256"] == s.content_hash(found)


def test_the_hash_is_of_the_content():
    one = s.SyntheticSet(("x",), ("é",), (0,), 0)
    assert s.content_hash(one) == hashlib.sha256('{"classes":["x"],"rows":[["é",0]]}'.encode()).hexdigest()
    found = made()
    assert s.content_hash(found) == s.content_hash(made(version=9))
    for other in (
        s.SyntheticSet(CLASSES, found.texts, (1, 1, 0, 1), 3),
        s.SyntheticSet(("world", "sport"), found.texts, found.labels, 3),
        s.SyntheticSet(CLASSES, found.texts[::-1], found.labels[::-1], 3),
        s.SyntheticSet(CLASSES, ("x", *found.texts[1:]), found.labels, 3),
    ):
        assert s.content_hash(other) != s.content_hash(found)


def test_a_changed_file_is_refused(tmp_path):
    s.save(made(), tmp_path)
    rows = (tmp_path / s.ROWS).read_text()
    for wrong, message in [
        (rows.replace('"a"', '"A"'), "its manifest says"),
        (rows.split("\n", 1)[1], "its manifest says"),
        (rows.replace("sports", "sport"), "holds no synthetic set: 'sport'"),
        (rows[:-5], "holds no synthetic set"),
    ]:
        (tmp_path / s.ROWS).write_text(wrong)
        with pytest.raises(ValueError, match=message):
            s.load(tmp_path)
    (tmp_path / s.MANIFEST).unlink()
    with pytest.raises(FileNotFoundError):
        s.load(tmp_path)


def test_bad_sets_are_one_line():
    with pytest.raises(ValueError, match="labels must lie in 0..1"):
        s.SyntheticSet(CLASSES, ("a",), (2,), 0)
    with pytest.raises(ValueError, match="texts .1. and labels .0. must be as many"):
        s.SyntheticSet(CLASSES, ("a",), (), 0)
    with pytest.raises(ValueError, match="classes must be distinct"):
        s.SyntheticSet(("a", "a"), (), (), 0)
