"""Private parameters against plain loops; private ranks of a LoRA as a sum of two products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from fmfl_jax.fed.algorithms.partial import join_ranks, partial_model, split_ranks
from fmfl_jax.fed.core.round import make_round
from fmfl_jax.fed.core.types import Traffic
from fmfl_jax.transport.size import tree_bits
from tests.fed import quadratics

N, STEPS, ETA = 9, 3, 0.1


def loss_fn(params, frozen, batch, key):
    """A two-layer regression, "body" and "head": batch [B, 4], the last column is the target."""
    return jnp.mean((jnp.tanh(batch[:, :3] @ params["body"]) @ params["head"] - batch[:, 3]) ** 2)


grad_fn = jax.value_and_grad(loss_fn)
BATCHES = np.random.default_rng(0).normal(size=(N, STEPS, 5, 4)).astype(np.float32)


def start():
    rng = np.random.default_rng(1)
    return {
        "body": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=2), jnp.float32),
    }


@functools.cache
def step_fn(names):
    return jax.jit(
        lambda params, batch: jax.tree.map(
            lambda p, g, moves: p - ETA * g * moves,
            params,
            jax.grad(loss_fn)(params, None, batch, None),
            {name: float(name in names) for name in params},
        )
    )


@pytest.mark.parametrize("kept_steps", [None, 2, 4])
def test_rounds_equal_a_plain_loop(kept_steps):
    """FedPer trains head and body together, FedRep the head first; the second round's clients are another cohort."""
    cohorts = [np.arange(N), np.asarray([4, 0, 7])]
    kept = {"head": start()["head"]}
    algorithm = partial_model(grad_fn, optax.sgd(ETA), optax.sgd(0.5), kept=kept, kept_steps=kept_steps)
    state, states, _ = quadratics.play(algorithm, start(), BATCHES, rounds=2, cohorts=cohorts)
    body, heads = start()["body"], [start()["head"]] * N
    for cohort in cohorts:
        bodies = []
        for i in cohort:
            params = {"body": body, "head": heads[i]}
            for s in range(kept_steps or 0):
                params = step_fn(("head",))(params, BATCHES[i, s % STEPS])
            for batch in BATCHES[i]:
                params = step_fn(("body",) if kept_steps else ("body", "head"))(params, batch)
            heads[i] = params["head"]
            bodies.append(params["body"])
        body = body + 0.5 * (sum(bodies) / len(bodies) - body)
    assert set(state.params) == {"body"}  # no head ever reaches the server
    np.testing.assert_allclose(state.params["body"], body, atol=1e-5)
    np.testing.assert_allclose(states.algorithm["head"], np.stack(heads), atol=1e-5)
    own = algorithm.personal(state.params, jax.tree.map(lambda x: x[7], states.algorithm))
    np.testing.assert_allclose(own["head"], heads[7], atol=1e-5)
    np.testing.assert_array_equal(algorithm.shared(state.params)["head"], start()["head"])
    assert make_round(algorithm).traffic(state, np.arange(N), None, N) == Traffic(6 * 32, 6 * 32)


def test_nothing_private_is_fed_avg_bit_for_bit():
    algorithm = partial_model(grad_fn, optax.adam(ETA), kept={})
    state, states, _ = quadratics.play(algorithm, start(), BATCHES, rounds=2)
    expected, *_ = quadratics.play(fed_opt(grad_fn, optax.adam(ETA)), start(), BATCHES, rounds=2)
    jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)
    assert states == () and algorithm.personal is None


def lora(rank=5):
    rng = np.random.default_rng(2)
    return {
        f"{m}.lora_{x}": jnp.asarray(rng.normal(size=shape), jnp.float32)
        for m, d, f in (("q", 6, 4), ("v", 6, 3))
        for x, shape in (("a", (d, rank)), ("b", (rank, f)))
    }


@pytest.mark.parametrize("rank", range(5))
def test_private_ranks_are_a_second_lora(rank):
    params = lora()
    shared, own = split_ranks(params, rank)
    assert not set(shared) & set(own)
    assert tree_bits(own) == rank * (6 + 4 + 6 + 3) * 32 and tree_bits(shared) == (5 - rank) * (6 + 4 + 6 + 3) * 32
    jax.tree.map(np.testing.assert_array_equal, join_ranks(shared | own), params)
    if rank:
        product = shared["q.lora_a"] @ shared["q.lora_b"] + own["q.lora_a.private"] @ own["q.lora_b.private"]
        np.testing.assert_allclose(product, params["q.lora_a"] @ params["q.lora_b"], atol=1e-5)


def test_rounds_with_private_ranks():
    """With the shared ranks' B at zero and a server that does not move, a client trains its own ranks alone: as if the
    LoRA had no others."""

    def lora_loss(params, frozen, batch, key):
        joined = join_ranks(params)
        return jnp.mean((batch @ joined["q.lora_a"] @ joined["q.lora_b"] - batch[:, :4]) ** 2)

    params = {name: value for name, value in lora().items() if name.startswith("q")}
    params["q.lora_b"] = params["q.lora_b"].at[:3].set(0.0)
    shared, own = split_ranks(params, 2)
    shared["q.lora_a"] = jnp.zeros_like(shared["q.lora_a"])  # then B has no gradient, and A none for B = 0
    batches = np.random.default_rng(3).normal(size=(N, STEPS, 5, 6)).astype(np.float32)
    algorithm = partial_model(jax.value_and_grad(lora_loss), optax.sgd(ETA), kept=own)
    state, states, _ = quadratics.play(algorithm, shared | own, batches, rounds=1)
    jax.tree.map(np.testing.assert_array_equal, state.params, shared)
    small = {name.removesuffix(".private"): value for name, value in own.items()}
    for i in (0, 8):
        alone = small
        for batch in batches[i]:
            grad = jax.grad(lora_loss)(alone, None, batch, None)
            alone = jax.tree.map(lambda p, g: p - ETA * g, alone, grad)
        for name, value in alone.items():
            np.testing.assert_allclose(states.algorithm[name + ".private"][i], value, atol=1e-5)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="tail is to be kept"):
        partial_model(grad_fn, optax.sgd(ETA), kept={"tail": start()["head"]}).init(start(), 0)
    with pytest.raises(ValueError, match="nothing is left to share"):
        partial_model(grad_fn, optax.sgd(ETA), kept=start()).init(start(), 0)
    for options in ({"kept": {}, "kept_steps": 1}, {"kept": {"head": start()["head"]}, "kept_steps": 0}):
        with pytest.raises(ValueError, match="FedRep"):
            partial_model(grad_fn, optax.sgd(ETA), **options)
    with pytest.raises(ValueError, match="0 to 4"):
        split_ranks(lora(), 5)
    with pytest.raises(ValueError, match="only LoRA factors"):
        split_ranks(lora() | start(), 2)
