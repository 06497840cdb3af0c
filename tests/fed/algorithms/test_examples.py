"""The examples in the algorithms' docstrings run, with what stands around them."""

import doctest
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.fed import algorithms
from fmfl_jax.fed.core.client import run_client
from fmfl_jax.fed.core.types import Aggregate, ClientContext
from tests.fed import every_algorithm
from tests.fed.every_algorithm import TARGETS, WEIGHT, grad_fn, loss_fn

FOLDER = pathlib.Path(algorithms.__path__[0])
EXAMPLES = sorted(
    ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    for path in FOLDER.rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)


def surroundings(name: str) -> dict:
    """The names that an example may take as given: a model's functions and parameters, one client and its data."""
    factors = every_algorithm.start(rank=8)
    params, loss, grad = factors, loss_fn, grad_fn
    if name == "partial":  # a model with a head

        def loss(params, frozen, batch, key):
            return loss_fn(params, frozen, batch, key) + jnp.sum(params["head"] ** 2)

        params, grad = factors | {"head": jnp.ones(3, jnp.float32)}, jax.value_and_grad(loss)
    return {
        "loss_fn": loss,
        "grad_fn": grad,
        "params": params,
        "frozen": WEIGHT,
        "factors": factors,
        "weights": WEIGHT,
        "targets": TARGETS,
        "batches": every_algorithm.batches((3,), seed=0),
        "client_id": jnp.int32(2),
        "weight": jnp.float32(5),
        "key": jax.random.key(0),
        "jax": jax,
        "optax": every_algorithm.optax,
        "run_client": run_client,
        "ClientContext": ClientContext,
        "Aggregate": Aggregate,
    }


def test_every_algorithm_has_an_example():
    assert EXAMPLES == sorted(
        ["apfl", "ditto", "fed_buff", "fed_opt", "partial", "scaffold", "lora.flex_lora", "lora.flora", "lora.het_lora"]
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name):
    module = importlib.import_module(f"{algorithms.__name__}.{name}")
    examples = doctest.DocTestParser().get_examples(module.__doc__)
    function = "partial_model" if name == "partial" else name.rpartition(".")[2]
    names = surroundings(name) | {function: getattr(module, function)}
    has_server = any(example.source.startswith("state =") for example in examples)
    for example in examples:
        assert not example.want  # all are assignments
        exec(compile(example.source, f"{name}, line {example.lineno}", "exec"), names)
        if example is examples[0] and not has_server:  # the server that a client's example takes as given
            names["state"] = names["later"] = names["algorithm"].init(names["params"], seed=0)
    update = names["result"].update if "result" in names else names["update"] if "update" in names else names["factors"]
    leaves = [np.asarray(x) for x in jax.tree.leaves(update)]
    assert all(np.all(np.isfinite(x)) for x in leaves) and any(np.any(x) for x in leaves)
    if name == "partial":
        assert "head" not in update and "head" in names["model"]
