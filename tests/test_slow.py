"""slow.txt names tests that are there."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def test_the_slow_tests_exist():
    entries = [line for line in (ROOT / "tests" / "slow.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(entries) == len(set(entries)) > 0
    for entry in entries:
        file, _, name = entry.partition("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"^def {re.escape(name.partition('[')[0])}\(", text, re.M), entry
