"""Rounds against plain Python loops, closed forms and published values."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fmfl_jax.fed.algorithms import server_optimizers
from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from fmfl_jax.fed.core.cohort import lay_out, put_on_devices
from fmfl_jax.fed.core.execution import pmap_round
from fmfl_jax.fed.core.round import make_round
from fmfl_jax.fed.core.types import Aggregate, Cohort, Execution
from fmfl_jax.parallel import AXIS, replicate


def regression_loss(params, frozen, batch, key):
    """A small nonlinear regression: batch [B, 4], the last column is the target."""
    x, y = batch[:, :3], batch[:, 3]
    return jnp.mean((jnp.tanh(x @ params["w"] * frozen) + params["b"][0] - y) ** 2)


gradient = jax.jit(jax.grad(regression_loss))


def quadratic_loss(params, frozen, batch, key):
    """1/2 ||w - a||^2, each client's optimum a is its batch [1, d]."""
    return 0.5 * jnp.sum((params["w"] - batch[0]) ** 2)


def regression_cohort(num_clients, seed=0):
    rng = np.random.default_rng(seed)
    return Cohort(
        np.arange(num_clients, dtype=np.int32),
        rng.integers(1, 50, num_clients).astype(np.float32),
        rng.normal(size=(num_clients, 3, 5, 4)).astype(np.float32),
    )


def start():
    return {"w": jnp.asarray([0.3, -0.2, 0.1], jnp.float32), "b": jnp.zeros(1, jnp.float32)}


FROZEN = jnp.asarray(1.5, jnp.float32)


def run_round(algorithm, cohort, params, *, rounds=1, frozen=FROZEN, clients_per_pass=None):
    whole = make_round(algorithm, execution=Execution(clients_per_pass=clients_per_pass))
    state, step, metrics = replicate(whole.init(params, 7)), pmap_round(whole), None
    laid_out = put_on_devices(cohort, clients_per_pass=clients_per_pass)
    for _ in range(rounds):
        state, metrics, _ = step(state, replicate(frozen), laid_out)
    return state, metrics


def python_loop(cohort, params, learning_rate):
    """FedAvg of SGD clients, one after another, in plain Python."""
    total = jax.tree.map(np.zeros_like, params)
    for weight, batches in zip(cohort.weights, cohort.batches):
        local = params
        for batch in batches:
            grad = gradient(local, FROZEN, batch, None)
            local = jax.tree.map(lambda p, g: p - learning_rate * g, local, grad)
        total = jax.tree.map(lambda t, p: t + weight / cohort.weights.sum() * np.asarray(p), total, local)
    return total


def assert_close(a, b, tolerance=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize("num_clients, clients_per_pass", [(1, None), (8, None), (13, None), (21, 2), (40, 5)])
def test_sharded_round_equals_a_python_loop(num_clients, clients_per_pass):
    cohort = regression_cohort(num_clients)
    algorithm = fed_opt(jax.value_and_grad(regression_loss), optax.sgd(0.1))
    state, metrics = run_round(algorithm, cohort, start(), clients_per_pass=clients_per_pass)
    assert_close(dict(state.params), python_loop(cohort, start(), 0.1))
    assert metrics["examples"] == cohort.weights.sum() and metrics["dropped_clients"] == 0


def test_one_client_one_step_is_centralized_sgd():
    cohort = regression_cohort(1)
    cohort = cohort._replace(batches=cohort.batches[:, :1])
    state, _ = run_round(fed_opt(jax.value_and_grad(regression_loss), optax.sgd(0.1)), cohort, start())
    grad = gradient(start(), FROZEN, cohort.batches[0, 0], None)
    assert_close(dict(state.params), jax.tree.map(lambda p, g: p - 0.1 * g, start(), grad), 1e-7)


def test_order_of_clients_changes_nothing():
    cohort = regression_cohort(13)
    order = np.random.default_rng(1).permutation(13)
    algorithm = fed_opt(jax.value_and_grad(regression_loss), optax.adamw(0.1))
    first, _ = run_round(algorithm, cohort, start())
    second, _ = run_round(algorithm, jax.tree.map(lambda x: x[order], cohort), start())
    assert_close(first.params, second.params)


def test_the_same_body_under_shard_map_on_a_two_dimensional_mesh():
    cohort = lay_out(regression_cohort(8), num_devices=4)
    whole = make_round(fed_opt(jax.value_and_grad(regression_loss), optax.sgd(0.1)))
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), (AXIS, "model"))
    body = jax.shard_map(
        lambda s, f, c: whole.spmd(s, f, jax.tree.map(lambda x: x[0], c)),
        mesh=mesh,
        in_specs=(P(), P(), P(AXIS)),
        out_specs=(P(), P(), P(AXIS)),
        check_vma=False,
    )
    state, *_ = jax.jit(body)(whole.init(start(), 0), FROZEN, cohort)
    assert_close(dict(state.params), python_loop(regression_cohort(8), start(), 0.1))


def test_clients_that_are_not_finite_never_reach_the_model():
    cohort = regression_cohort(9)
    poisoned = cohort.batches.copy()
    poisoned[2], poisoned[5] = np.nan, np.inf
    algorithm = fed_opt(jax.value_and_grad(regression_loss), optax.sgd(0.1))
    state, metrics = run_round(algorithm, cohort._replace(batches=poisoned), start())
    keep = np.delete(np.arange(9), [2, 5])
    assert_close(dict(state.params), python_loop(jax.tree.map(lambda x: x[keep], cohort), start(), 0.1))
    assert metrics["dropped_clients"] == 2


def test_a_round_nobody_survives_leaves_the_server_as_it_was():
    cohort = regression_cohort(9)._replace(weights=np.zeros(9, np.float32))
    algorithm = fed_opt(jax.value_and_grad(regression_loss), optax.sgd(0.1), optax.adam(0.1))
    state, metrics = run_round(algorithm, cohort, start())
    before = algorithm.init(start(), 7)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (before.params, before.opt_state))
    assert state.round == 1 and metrics["examples"] == 0 and np.isnan(metrics["loss"])


def test_fed_prox_stops_between_the_server_and_the_client():
    """min 1/2 ||w - a||^2 + mu/2 ||w - w0||^2 is (a + mu w0) / (1 + mu); many steps of a client reach it."""
    a, w0, mu = np.asarray([2.0, -1.0], np.float32), np.asarray([0.5, 0.5], np.float32), 3.0
    cohort = Cohort(np.zeros(1, np.int32), np.ones(1, np.float32), np.broadcast_to(a, (1, 100, 1, 2)))
    algorithm = fed_opt(jax.value_and_grad(quadratic_loss), optax.sgd(0.2), proximal=mu)
    state, _ = run_round(algorithm, cohort, {"w": jnp.asarray(w0)})
    np.testing.assert_allclose(state.params["w"], (a + mu * w0) / (1 + mu), atol=1e-6)


@pytest.mark.parametrize(
    "server, expected",
    [
        (optax.adam(0.1, b1=0.9, b2=0.99, eps=1e-3, eps_root=0.0), [0.199800, 0.234327, 0.272284]),
        (optax.sgd(1.0, momentum=0.9), [0.6, 0.85, 1.175]),
        (server_optimizers.fed_adam(0.1), [0.198020, 0.243784, 0.302567]),
        (server_optimizers.fed_yogi(0.1), [0.198020, 0.243590, 0.301853]),
        # v = tau^2 + .25, + .04, + .01: steps of .1 d / (sqrt(v) + tau)
        (
            server_optimizers.fed_adagrad(0.1),
            np.cumsum(
                [0.1, *(0.1 * d / (math.sqrt(v + 1e-6) + 1e-3) for d, v in ((0.5, 0.25), (-0.2, 0.29), (0.1, 0.30)))]
            )[1:],
        ),
    ],
)
def test_server_optimizers_give_their_published_values(server, expected):
    """First coordinate .1 under client means of w + .5, w - .2, w + .1 (optax's Adam, FedAvgM, and Reddi et al.,
    Algorithm 2)."""
    algorithm = fed_opt(jax.value_and_grad(quadratic_loss), optax.sgd(1.0), server)
    state, step = algorithm.init({"w": jnp.full(1, 0.1, jnp.float32)}, 0), jax.jit(algorithm.server)
    for moved, value in zip([0.5, -0.2, 0.1], expected):
        state = step(state, Aggregate({"w": np.full(1, -moved, np.float32)}, {}, np.float32(1), np.float32(1)))
        np.testing.assert_allclose(state.params["w"], value, atol=2e-6)


def test_a_round_compiles_once():
    traces = []

    def counted(params, frozen, batch, key):
        traces.append(1)
        return regression_loss(params, frozen, batch, key)

    whole = make_round(fed_opt(jax.value_and_grad(counted), optax.adamw(0.1)))
    state, step = replicate(whole.init(start(), 0)), pmap_round(whole)
    counts = []
    for seed in range(4):
        state, *_ = step(state, replicate(FROZEN), put_on_devices(regression_cohort(13, seed)))
        counts.append(len(traces))
    assert counts[0] > 0 and counts[0] == counts[-1]


def test_the_distance_to_the_server_as_a_penalty_is_fedprox():
    """mu / 2 ||w - w_server||^2 as a function whose gradient is taken, and its gradient by hand."""
    cohort, mu = regression_cohort(3), 0.7

    def penalty(params, server, frozen):
        del frozen
        return mu / 2 * sum(jnp.sum((params[name] - server[name]) ** 2) for name in params)

    grad_fn = jax.value_and_grad(regression_loss)
    ours = run_round(fed_opt(grad_fn, optax.sgd(0.1), penalty=penalty), cohort, start())[0]
    theirs = run_round(fed_opt(grad_fn, optax.sgd(0.1), proximal=mu), cohort, start())[0]
    plain = run_round(fed_opt(grad_fn, optax.sgd(0.1)), cohort, start())[0]
    assert_close(ours.params, theirs.params)
    assert np.abs(np.asarray(ours.params["w"]) - np.asarray(plain.params["w"])).max() > 1e-4
