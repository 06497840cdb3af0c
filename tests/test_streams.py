"""No two random streams draw the same numbers: constants apart at every level, and nobody seeds beside them."""

import ast
import pathlib
import re

import pytest

from fmfl_jax import streams

ROOT = pathlib.Path(__file__).parent.parent / "fmfl_jax"
SOURCES = sorted(path for path in ROOT.rglob("*.py") if path.name != "streams.py")
# Seeds without a stream; what is repaired leaves the list.


def levels() -> dict[str, dict[str, int]]:
    """{heading: {name: value}}: the constants of streams.py under the comment that says where they go."""
    constants, heading = {}, None
    for line in (ROOT / "streams.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            heading = line[2:]
        elif match := re.match(r"([A-Z_]+) = ", line):
            constants.setdefault(heading, {})[match[1]] = getattr(streams, match[1])
    return constants


LEVELS = levels()


def test_all_constants_stand_at_a_level():
    names = {name for name in vars(streams) if name.isupper()}
    assert len(LEVELS) == 4 and None not in LEVELS
    assert {name for level in LEVELS.values() for name in level} == names


@pytest.mark.parametrize("heading", LEVELS)
def test_no_two_streams_of_a_level_share_a_constant(heading):
    values = list(LEVELS[heading].values())
    assert len(set(values)) == len(values)


def test_folded_constants_stay_beyond_the_numbers_beside_them():
    """Rounds stay below 2**22, client numbers and local steps below 2**30; all fit the uint32 of fold_in."""
    for heading, level in LEVELS.items():
        least = 1 if heading.startswith("First words") else 2**22 if "run's key" in heading else 2**30
        assert all(least <= value < 2**32 for value in level.values()), heading


def test_seeds_of_different_streams_never_draw_the_same():
    """numpy pads seeds with zeros, so (stream,), (stream, 0) and (stream, 0, 0) are one: a stream has one length."""
    drawn = [
        streams.host_rng(stream, *words).integers(2**63)
        for stream in LEVELS["First words of seeds on the host."].values()
        for words in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1))
    ]
    assert len(set(drawn)) == len(drawn)
    assert streams.host_rng(3, 0).integers(2**63) == streams.host_rng(3, 0, 0).integers(2**63)


def calls(path: pathlib.Path, function: str):
    """The calls of a function or method of this name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None)) == function:
            yield node


def stream_of(node: ast.expr) -> str | None:
    """NAME of an expression streams.NAME."""
    is_stream = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "streams"
    return node.attr if is_stream else None


def test_every_seed_of_several_words_begins_with_a_stream():
    offenders = {}
    for path in SOURCES:
        for call in calls(path, "default_rng"):
            if call.args and isinstance(call.args[0], ast.Tuple) and stream_of(call.args[0].elts[0]) is None:
                offenders[str(path.relative_to(ROOT))] = ast.unparse(call.args[0])
    assert not offenders


def test_a_stream_of_the_host_is_used_with_one_number_of_words():
    words = {}
    for path in SOURCES:
        for call in calls(path, "host_rng"):
            stream = stream_of(call.args[0])
            assert stream in LEVELS["First words of seeds on the host."], f"{path}: {ast.unparse(call)}"
            words.setdefault(stream, set()).add(len(call.args))
    assert len(words) > 5 and all(len(lengths) == 1 for lengths in words.values()), words
