"""No two random streams share a seed by accident."""

import ast
import pathlib

import numpy as np

from fmfl_jax import streams

ROOT = pathlib.Path(__file__).parents[1]
CONSTANTS = {name: value for name, value in vars(streams).items() if name.isupper()}
HOST = [n for n in CONSTANTS if not n.startswith("NETWORK_") and CONSTANTS[n] < 2**30]
OF_KEYS = {
    "the run": ("NETWORK_PLACES", "NETWORK_ROUND", "NETWORK_BASE"),
    "a round": ("SERVER", "ATTACK", "AGGREGATE"),
    "a client": ("PERSONAL", "CODEC", "FRESH_FACTORS"),
}


def test_streams_differ_wherever_they_stand_beside_each_other():
    assert sorted(CONSTANTS) == sorted([*HOST, *(name for names in OF_KEYS.values() for name in names)])
    for names in (HOST, *OF_KEYS.values()):
        assert len({CONSTANTS[name] for name in names}) == len(names), names
    for names in (OF_KEYS["a round"], OF_KEYS["a client"]):  # beside client numbers, and the numbers of steps
        assert all(2**30 <= CONSTANTS[name] < 2**32 for name in names)


def test_a_stream_is_no_other_streams_with_zeros_behind():
    """What numpy does to (seed, client) and (seed, round, 0): the reason for the first word."""
    draw = lambda rng: rng.integers(2**62)
    assert draw(np.random.default_rng((3, 4))) == draw(np.random.default_rng((3, 4, 0)))
    words = [(3,), (3, 4), (3, 4, 5), (4, 3), (4, 3, 5)]
    found = [draw(streams.host_rng(CONSTANTS[name], *w)) for name in HOST for w in words]
    assert len(set(found)) == len(HOST) * len(words)


# Apart from every federated round: the steps of pre-training, which come before any, and the audit's own world.
ELSEWHERE = {"pretrain.py", "audit.py"}


def test_no_other_generator_is_seeded_with_several_numbers():
    for path in (ROOT / "fmfl_jax").rglob("*.py"):
        if path.name in ("streams.py", *ELSEWHERE):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("default_rng"):
                assert not isinstance(node.args[0], ast.Tuple | ast.List), path
