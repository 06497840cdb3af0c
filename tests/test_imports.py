"""Who may import whom (see the map in README.md), and who may know of flags."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# package -> what it must not import, directly or by name
FORBIDDEN = {
    "kernels": ["fmfl_jax", "launch", "flax", "absl"],
    "fmfl_jax/fed": ["fmfl_jax.models", "fmfl_jax.peft", "fmfl_jax.quant", "fmfl_jax.experiment", "flax"],
    "fmfl_jax/wireless": ["fmfl_jax.models", "fmfl_jax.peft", "fmfl_jax.quant", "fmfl_jax.experiment", "flax"],
    "fmfl_jax/data": ["fmfl_jax.models", "fmfl_jax.peft", "fmfl_jax.quant", "fmfl_jax.experiment", "jax", "flax"],
    "fmfl_jax/small": [
        "fmfl_jax.models",
        "fmfl_jax.peft",
        "fmfl_jax.quant",
        "fmfl_jax.experiment",
        "fmfl_jax.fed",
        "flax",
    ],
    "fmfl_jax/quant": ["fmfl_jax.models", "fmfl_jax.peft", "fmfl_jax.experiment", "flax"],
    "fmfl_jax/models": ["fmfl_jax.peft", "fmfl_jax.experiment", "fmfl_jax.fed", "fmfl_jax.wireless"],
    "fmfl_jax/peft": ["fmfl_jax.experiment", "fmfl_jax.fed", "fmfl_jax.wireless"],
    "fmfl_jax": ["launch", "absl"],
}
BENCHMARKS = {"kernels/w4a16/bench.py", "kernels/w4a16/tune.py"}  # scripts with flags of their own


def imported_names(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_import_directions(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        if str(path.relative_to(ROOT)) in BENCHMARKS:
            continue
        for name in imported_names(path):
            for forbidden in FORBIDDEN[package]:
                assert name != forbidden and not name.startswith(forbidden + "."), f"{path} imports {name}"
