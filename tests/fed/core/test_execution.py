"""The three ways to run clients against each other and a plain numpy loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmfl_jax.data.shards import epoch_batches, max_steps, shards_of
from fmfl_jax.fed.aggregators.robust import median
from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from fmfl_jax.fed.algorithms.server_optimizers import fed_adam
from fmfl_jax.fed.attacks import sign_flip
from fmfl_jax.fed.core.cohort import put_on_devices
from fmfl_jax.fed.core.execution import MODES, default_mode, execution_of, pmap_round, stepwise_round
from fmfl_jax.fed.core.round import Transport, make_round
from fmfl_jax.fed.core.types import ClientState, Cohort
from fmfl_jax.models.classifiers import classification_loss, linear_classifier, small_cnn
from fmfl_jax.parallel import replicate
from fmfl_jax.transport.sparsify import top_k

FEATURES, CLASSES, BATCH = 5, 3, 4
MODEL = linear_classifier(FEATURES, CLASSES)
SIZES = np.asarray([1, 3, 4, 5, 9, 2, 13, 8, 7, 6, 4])  # unequal; most last batches are smaller


@pytest.fixture(autouse=True)
def two_devices(only_devices):
    """Of which the second has fewer clients."""
    only_devices(2)


@functools.cache
def rows():
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(SIZES.sum(), FEATURES)).astype(np.float32),
        "y": rng.integers(CLASSES, size=SIZES.sum()).astype(np.int32),
    }


def cohort(round=0):
    shards = shards_of(np.split(np.random.default_rng(1).permutation(SIZES.sum()), np.cumsum(SIZES)[:-1]))
    ids = np.arange(len(SIZES))
    batches, steps = epoch_batches(
        shards,
        ids,
        round=round,
        seed=3,
        batch_size=BATCH,
        epochs=2,
        num_steps=max_steps(shards, batch_size=BATCH, epochs=2) + 1,
    )
    return Cohort(ids.astype(np.int32), SIZES.astype(np.float32), batches, num_steps=steps)


def compiled(mode, algorithm, **parts):
    """(the round, the same compiled or driven from Python) in one of MODES."""
    whole = make_round(algorithm, execution=execution_of(mode), **parts)
    return whole, (stepwise_round if whole.execution.stepwise else pmap_round)(whole)


def run(mode, algorithm, *, rounds=2, client_states=(), change=lambda c: c, **parts):
    whole, step = compiled(mode, algorithm, **parts)
    state, frozen = replicate(whole.init(MODEL.init(None), 7)), replicate(rows())
    for r in range(rounds):
        given = change(cohort(r))._replace(client_states=client_states)
        laid_out = put_on_devices(given, clients_per_pass=whole.execution.clients_per_pass)
        state, metrics, report = step(state, frozen, laid_out)
    return dict(state.params), metrics, report


def numpy_fed_avg(rounds, learning_rate=0.3, mu=0.0):
    """(params, loss of the last round): softmax regression by hand, client after client, only the rows that count."""
    w, b = np.zeros((FEATURES, CLASSES)), np.zeros(CLASSES)
    for r in range(rounds):
        given = cohort(r)
        new_w, new_b, loss = np.zeros_like(w), np.zeros_like(b), 0.0
        for c, share in enumerate(SIZES / SIZES.sum()):
            local_w, local_b, losses = w, b, []
            for s in range(given.num_steps[c]):
                chosen = given.batches["index"][c, s][given.batches["mask"][c, s]]
                x, y = rows()["x"][chosen].astype(float), rows()["y"][chosen]
                logits = x @ local_w + local_b
                p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
                losses.append(-np.log(p[np.arange(len(y)), y]).mean())
                error = (p - np.eye(CLASSES)[y]) / len(y)
                local_w, local_b = (
                    local_w - learning_rate * (x.T @ error + mu * (local_w - w)),
                    local_b - learning_rate * (error.sum(axis=0) + mu * (local_b - b)),
                )
            new_w, new_b, loss = new_w + share * local_w, new_b + share * local_b, loss + share * np.mean(losses)
        w, b = new_w, new_b
    return {"w": w, "b": b}, loss


def assert_close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize("mode, mu", [("vmap", 0.0), ("scan", 0.0), ("steps", 0.7)])
def test_unequal_clients_equal_a_numpy_loop(mode, mu):
    params, metrics, _ = run(mode, fed_opt(jax.value_and_grad(classification_loss(MODEL)), optax.sgd(0.3), proximal=mu))
    expected, loss = numpy_fed_avg(2, mu=mu)
    assert_close(params, expected)
    assert_close(metrics["loss"], loss)
    assert float(metrics["examples"]) == SIZES.sum() and float(metrics["dropped_clients"]) == 0


def noisy_grad(params, frozen, batch, key):
    """A gradient that is the step's own random numbers."""
    del frozen, batch
    grad = {name: jax.random.normal(jax.random.fold_in(key, i), x.shape) for i, (name, x) in enumerate(params.items())}
    return jnp.float32(0), grad


def test_one_round_by_one_definition():
    """The same keys, client and server optimizers, codec, attack and aggregator in all modes."""

    def grad_fn(params, frozen, batch, key):
        loss, grad = jax.value_and_grad(classification_loss(MODEL))(params, frozen, batch, key)
        return loss, jax.tree.map(jnp.add, grad, noisy_grad(params, frozen, batch, key)[1])

    malicious = np.arange(len(SIZES)) < 2
    codec = top_k(0.5)
    states = jax.tree.map(
        lambda x: np.zeros((len(SIZES), *x.shape), x.dtype), ClientState(codec=codec.init(MODEL.init(None)))
    )
    results = [
        run(
            mode,
            fed_opt(grad_fn, optax.adam(0.05), fed_adam(0.1)),
            transport=Transport(codec=codec),
            attack=sign_flip(),
            aggregator=median(),
            client_states=states,
            change=lambda c: c._replace(extras=c.extras | {"malicious": malicious}),
        )
        for mode in MODES
    ]
    for params, metrics, report in results[1:]:
        assert_close(params, results[0][0])
        assert_close(metrics, results[0][1])
        assert_close(report.states, results[0][2].states)


@pytest.mark.parametrize("mode", ["scan", "steps"])
def test_a_client_that_is_not_finite_or_not_delivered_does_not_count(mode):
    delivered = np.ones(len(SIZES), bool)
    delivered[4] = False

    def poisoned(params, frozen, batch, key):  # rows of class 2 are poison
        loss, grad = noisy_grad(params, frozen, batch, key)
        bad = jnp.any(batch["mask"] & (batch["index"] == cohort().batches["index"][6, 0, 0]))
        return loss, jax.tree.map(lambda g: jnp.where(bad, jnp.nan, g), grad)

    def change(c):
        return c._replace(delivered=delivered, weights=np.where(delivered, c.weights, 0).astype(np.float32))

    params, metrics, _ = run(mode, fed_opt(poisoned, optax.sgd(0.3)), rounds=1, change=change)
    keep = np.delete(np.arange(len(SIZES)), [4, 6])
    expected, _, _ = run(
        "scan",
        fed_opt(noisy_grad, optax.sgd(0.3)),
        rounds=1,
        change=lambda c: jax.tree.map(lambda x: x[keep], c),
    )
    assert_close(params, expected, 1e-6)
    assert metrics["dropped_clients"] == 1


def test_other_modes_are_refused():
    with pytest.raises(ValueError, match="vmap, scan, steps"):
        execution_of("unrolled")


def test_the_default_on_a_cpu_goes_by_convolutions():
    batch = {"index": np.zeros(2, np.int32), "mask": np.ones(2, bool)}
    for model, x, mode in [
        (linear_classifier(4, 2), np.zeros((3, 4), np.float32), "scan"),
        (small_cnn(4, 2), np.zeros((3, 4, 4, 1), np.float32), "steps"),
    ]:
        frozen = {"x": x, "y": np.zeros(3, np.int32)}
        assert (
            default_mode(jax.value_and_grad(classification_loss(model)), model.init(jax.random.key(0)), frozen, batch)
            == mode
        )
