"""The cache of scores: asks once, shared by processes, damage is one line."""

import sqlite3
import subprocess
import sys

import numpy as np
import pytest

from fmfl_jax.services.cache import ScoreCache, cached, checkpoint_hash, score_key

WORDS = [" a", " b"]


class Model:
    """Scores by length, and counts."""

    def __init__(self):
        self.asked = []

    def __call__(self, texts, words):
        self.asked += texts
        return np.asarray([[len(text), len(text) / 3] for text in texts], np.float32)


def test_what_is_there_is_not_asked_again(tmp_path):
    model, path = Model(), tmp_path / "new" / "scores.sqlite"
    texts = ["one", "three", "one", "\ud800 half a pair"]
    with ScoreCache(path) as cache:
        first = cached(model, cache, model="m")(texts, WORDS)
        assert (cache.hits, cache.misses) == (0, 4) and model.asked == ["one", "three", texts[3]]
    with ScoreCache(path) as cache:
        score = cached(model, cache, model="m")
        np.testing.assert_array_equal(score(texts, WORDS), first)
        assert first.dtype == np.float32 and len(model.asked) == 3 and cache.hits == 4
        score(["one", "new"], WORDS)  # a part of it
        cached(model, cache, model="other")(["one"], WORDS)
        score(["one"], [" ab", ""])  # other words, though the same letters
        assert model.asked[3:] == ["new", "one", "one"]
    assert len({score_key(*key) for key in [("m", "t", WORDS), ("mt", "", WORDS), ("m", "t a", [" b"])]}) == 3


def test_numbers_that_are_not_finite_are_not_kept(tmp_path):
    with ScoreCache(tmp_path / "s") as cache:
        with pytest.raises(ValueError, match="not finite"):
            cached(lambda texts, words: np.full((1, 2), np.nan), cache, model="m")(["x"], WORDS)
        assert cache.get([score_key("m", "x", WORDS)], 2) == [None]


def test_two_processes_write_at_once(tmp_path):
    path = tmp_path / "scores.sqlite"
    program = f"""
import numpy as np, sys
from fmfl_jax.services.cache import ScoreCache
with ScoreCache({str(path)!r}) as cache:
    for i in range(30):
        cache.put([b"%d" % i, b"%d" % i + sys.argv[1].encode()], np.full((2, 2), i))
"""
    runs = [subprocess.Popen([sys.executable, "-c", program, name]) for name in "ab"]
    assert [run.wait(60) for run in runs] == [0, 0]
    with ScoreCache(path) as cache:
        rows = cache.get([b"%d%s" % (i, end) for i in range(30) for end in (b"", b"a", b"b")], 2)
    np.testing.assert_array_equal(np.stack([row for row in rows if row is not None])[:, 0], np.repeat(range(30), 3))


def test_damage_is_one_line(tmp_path):
    path = tmp_path / "scores.sqlite"
    path.write_bytes(b"not a database, but long enough to look at " * 40)
    with pytest.raises(ValueError, match="scores.sqlite: a damaged cache of scores, or no such file; delete it"):
        ScoreCache(path)
    path.unlink()
    with ScoreCache(path) as cache:
        cached(Model(), cache, model="m")(["one"], WORDS)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE scores SET log_probs = x'00000000000000000000bad0'")
    with ScoreCache(path) as cache, pytest.raises(ValueError, match="a damaged record in the cache of scores"):
        cached(Model(), cache, model="m")(["one"], WORDS)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE theirs (x)")
    with pytest.raises(ValueError, match="is a database, but not of scores"):
        ScoreCache(other)
    with pytest.raises(ValueError, match="cannot be used"):
        ScoreCache(tmp_path)


def test_checkpoints_hash_tells_content_names_and_sizes(tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(1000))
    hashes = {checkpoint_hash([file])}
    for data in (bytes(999), bytes(500) + b"\1" + bytes(499)):
        file.write_bytes(data)
        hashes.add(checkpoint_hash([file]))
    hashes.add(checkpoint_hash([file.rename(tmp_path / "other.gguf")]))
    assert len(hashes) == 4 and checkpoint_hash([tmp_path]) == checkpoint_hash([tmp_path / "other.gguf"])
    monkeypatch.setattr("fmfl_jax.services.cache._WHOLE_BYTES", 100)
    monkeypatch.setattr("fmfl_jax.services.cache._HEAD", 64)
    monkeypatch.setattr("fmfl_jax.services.cache._BLOCK", 8)
    monkeypatch.setattr("fmfl_jax.services.cache._NUM_BLOCKS", 5)
    sampled = set()
    for place in (0, 63, 70, 999):  # in the head, in the first block, in the last
        data = bytearray(1000)
        data[place] = 1
        file.write_bytes(data)
        sampled.add(checkpoint_hash([file]))
    assert len(sampled) == 4
