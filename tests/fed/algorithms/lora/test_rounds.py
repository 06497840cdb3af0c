"""Rounds of the LoRA algorithms against loops in numpy that know no padding: every client has arrays of its own
rank."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from fmfl_jax.fed.algorithms.lora.bias import with_aggregation_bias
from fmfl_jax.fed.algorithms.lora.factors import Pair, factor_bits, full_rank, keep_rank, pairs_of
from fmfl_jax.fed.algorithms.lora.ffa_lora import freeze_a
from fmfl_jax.fed.algorithms.lora.flex_lora import flex_lora
from fmfl_jax.fed.algorithms.lora.flora import Target, flora, fresh_factors, split_params
from fmfl_jax.fed.algorithms.lora.het_lora import het_lora, pruned_rank
from fmfl_jax.fed.core.client import run_client
from fmfl_jax.fed.core.cohort import put_on_devices, without_padding
from fmfl_jax.fed.core.execution import pmap_round
from fmfl_jax.fed.core.round import Transport, make_round
from fmfl_jax.fed.core.types import Aggregator, ClientContext, Cohort
from fmfl_jax.parallel import replicate
from fmfl_jax.transport.codec import identity
from fmfl_jax.transport.size import tree_bits

SEED, RATE, SCALE = 7, 0.2, 0.5
TARGETS = (
    Target("m.lora.q.lora_a", "m.lora.q.lora_b", "m.weight", 0, 5),
    Target("m.lora.v.lora_a", "m.lora.v.lora_b", "m.weight", 5, 8),
)
PAIRS = tuple(Pair(t.a, t.b) for t in TARGETS)
WEIGHT = {"m.weight": np.random.default_rng(5).normal(size=(6, 8)).astype(np.float32)}
RANKS = (1, 3, 2, 4, 1, 2, 3, 4, 4, 2, 1)  # of eleven clients: two on most devices, padding on the others


def loss_fn(factors, frozen, batch, key):
    """A linear layer of two projections side by side, both adapted: mean squared error."""
    added = [(batch["x"] @ factors[t.a]) @ factors[t.b] for t in TARGETS]
    return jnp.mean((batch["x"] @ frozen["m.weight"] + SCALE * jnp.concatenate(added, axis=1) - batch["y"]) ** 2)


grad_fn = jax.value_and_grad(loss_fn)


def start(rank=4, *, zero_b=False):
    rng = np.random.default_rng(3)
    params = {}
    for t in TARGETS:
        params[t.a] = jnp.asarray(rng.normal(size=(6, rank)) * 0.5, jnp.float32)
        params[t.b] = jnp.asarray(rng.normal(size=(rank, t.stop - t.start)) * (0 if zero_b else 0.5), jnp.float32)
    return params


def cohort_of(whole, params, num_clients=11):
    rng = np.random.default_rng(num_clients)
    batches = {
        "x": rng.normal(size=(num_clients, 3, 4, 6)).astype(np.float32),
        "y": 3 * rng.normal(size=(num_clients, 3, 4, 8)).astype(np.float32),
    }
    ids = np.arange(num_clients, dtype=np.int32)
    states = ()
    if whole.keeps_client_states:
        states = jax.tree.map(lambda *x: np.stack(x), *[whole.init_client(params, i) for i in ids])
    return Cohort(ids, rng.integers(1, 9, num_clients).astype(np.float32), batches, client_states=states)


@functools.cache
def make(name, rank=4):
    """(the round, the same compiled, parameters to start from); compiled once for all tests."""
    params, aggregator = start(rank), Aggregator()
    match name:
        case "flora":
            params = start(rank, zero_b=True) | {"m.weight": jnp.asarray(WEIGHT["m.weight"])}
            algorithm = flora(grad_fn, optax.sgd(RATE), TARGETS, scale=SCALE, ranks=RANKS)
        case "flex":
            algorithm = flex_lora(grad_fn, optax.sgd(RATE), ranks=RANKS)
        case "het":
            algorithm = het_lora(grad_fn, optax.sgd(RATE), gamma=0.6, regularization=0.05, ranks=RANKS)
        case "fedit":
            aggregator = with_aggregation_bias(Aggregator())
            algorithm = fed_opt(grad_fn, optax.sgd(RATE))
    whole = make_round(algorithm, aggregator=aggregator)
    return whole, pmap_round(whole), params


def play(name, cohort=None, *, rank=4, rounds=1):
    whole, step, params = make(name, rank)
    state = replicate(whole.init(params, SEED))
    laid_out = put_on_devices(cohort_of(whole, params) if cohort is None else cohort)
    frozen = {} if name == "flora" else WEIGHT
    for _ in range(rounds):
        state, metrics, report = step(state, replicate(frozen), laid_out)
    return state, {k: float(v) for k, v in metrics.items()}, report


gradient = jax.jit(grad_fn)
fresh_of = jax.jit(lambda key: fresh_factors(start(), PAIRS, key))


def local_sgd(factors, batches, frozen, pull=lambda factors: {}):
    """A client's three steps on arrays of its own rank; pull(factors) is added to the gradient."""
    factors = jax.device_get(factors)  # in NumPy, which compiles nothing for another rank
    for i in range(3):
        grad = jax.device_get(gradient(factors, frozen, jax.tree.map(lambda x: x[i], batches), None)[1])
        more = jax.device_get(pull(factors))
        factors = {n: factors[n] - np.float32(RATE) * (grad[n] + more.get(n, np.float32(0))) for n in factors}
    return factors


def cut(factors, rank):
    """The first columns and rows, without padding."""
    return {n: x[:, :rank] if n.endswith("lora_a") else x[:rank] for n, x in factors.items()}


def pad(factors, rank=4):
    return {
        n: np.pad(x, ((0, 0), (0, rank - x.shape[1])) if n.endswith("lora_a") else ((0, rank - x.shape[0]), (0, 0)))
        for n, x in factors.items()
    }


def change(factors):
    """A B of both targets side by side, float64 [6, 8]."""
    return np.concatenate([np.asarray(factors[t.a], np.float64) @ factors[t.b] for t in TARGETS], axis=1)


def mean(values, weights):
    return sum(w * v for w, v in zip(weights / np.sum(weights), values))


def distance(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def one(cohort, c):
    return jax.tree.map(lambda x: x[c], cohort.batches)


def test_flora_adds_every_clients_exact_product_in_every_round():
    """Two rounds; the second starts from fresh factors on the first one's weights."""
    cohort = cohort_of(*(make("flora")[i] for i in (0, 2)))
    weight = WEIGHT["m.weight"].astype(np.float64)
    for r in range(2):
        deltas = []
        for c in range(11):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), r), c)
            fresh = jax.device_get(fresh_of(jax.random.fold_in(key, 2**31 - 5)))
            trained = local_sgd(cut(fresh, RANKS[c]), one(cohort, c), {"m.weight": weight.astype(np.float32)})
            deltas.append(SCALE * change(trained))
        update = mean(deltas, cohort.weights)
        weight = weight + update
    state, metrics, _ = play("flora", rounds=2)
    assert distance(state.params["m.weight"], weight) < 1e-6
    shares = cohort.weights / cohort.weights.sum()
    assert all(distance(update, update - s * d) > 1e-3 for s, d in zip(shares, deltas))  # nobody could be missing
    np.testing.assert_allclose(metrics["delta_norm"], np.linalg.norm(update), rtol=1e-5)
    uplink, downlink = make("flora")[0].traffic(state, np.arange(11), None, 11)
    assert metrics["download_bits"] == downlink == sum(uplink) == 32 * sum(RANKS) * (6 + 5 + 6 + 3)
    np.testing.assert_allclose(metrics["payload_bits"], mean(uplink, cohort.weights), rtol=1e-6)
    assert not np.any(state.params[TARGETS[0].b]) and not np.any(state.params[TARGETS[1].b])


def test_flora_divides_by_the_denominators():
    """Twice the weights' sum: lost clients that stay in the mean have changed nothing, so half the change is left."""
    cohort = cohort_of(*(make("flora")[i] for i in (0, 2)))
    whole, half = (
        play("flora", cohort._replace(denominators=n * cohort.weights))[0].params["m.weight"] for n in (1, 2)
    )
    assert distance(2 * (half - WEIGHT["m.weight"]), whole - WEIGHT["m.weight"]) < 1e-5


def test_flora_starts_with_the_model_it_is_given():
    """Factors that are not zero move into the weights."""
    batch = {"x": np.eye(6, dtype=np.float32), "y": np.zeros((6, 8), np.float32)}
    before = loss_fn(start(), WEIGHT, batch, None)
    state = make("flora")[0].init(start() | {"m.weight": jnp.asarray(WEIGHT["m.weight"])}, SEED)
    factors, weights = split_params(make("flora")[0].algorithm.shared(state.params), TARGETS)
    np.testing.assert_allclose(loss_fn(factors, weights, batch, None), before, rtol=1e-6)
    assert distance(weights["m.weight"], WEIGHT["m.weight"]) > 0.1
    assert tree_bits(make("flora")[0].algorithm.update_like(state.params)) == factor_bits(state.params, PAIRS, 4)


def flex_loop(cohort, params, ranks):
    """(mean of the matrices [6, 8], the clients' own) of FlexLoRA's clients."""
    ends = [local_sgd(cut(jax.device_get(params), ranks[c]), one(cohort, c), WEIGHT) for c in range(11)]
    return mean([change(end) for end in ends], cohort.weights)


@pytest.mark.parametrize("rank", [6, 4])
def test_flex_lora_is_the_svd_of_the_dense_mean(rank):
    """Exact at R = 6, which no mean exceeds; at 4 the projection of 5 columns is truncated, that of 3 is not."""
    whole, _, params = make("flex", rank)
    cohort = cohort_of(whole, params)
    state, metrics, report = play("flex", cohort, rank=rank)
    whole = flex_loop(cohort, params, RANKS)
    u, s, vt = np.linalg.svd(whole[:, :5], full_matrices=False)
    kept = np.concatenate([(u[:, :rank] * s[:rank]) @ vt[:rank], whole[:, 5:]], axis=1)
    assert distance(change(state.params), kept) < 1e-6
    np.testing.assert_allclose(metrics["aggregation_bias"], distance(kept, whole), rtol=1e-4, atol=1e-6)
    assert rank == 6 or metrics["aggregation_bias"] > 5e-4
    np.testing.assert_allclose(metrics["delta_norm"], np.linalg.norm(kept - change(params)), rtol=1e-5)
    expected = [factor_bits(params, PAIRS, r) for r in RANKS]
    np.testing.assert_array_equal(without_padding(report.metrics["payload_bits"], 11), expected)
    np.testing.assert_array_equal(without_padding(report.states.algorithm, 11), RANKS)


def test_a_flex_lora_client_has_the_best_approximation_of_its_rank():
    whole, _, params = make("flex")
    state, *_ = play("flex")
    mine = whole.algorithm.personal(state.params, whole.init_client(params, 2).algorithm)
    u, s, vt = np.linalg.svd(np.asarray(state.params[TARGETS[0].a] @ state.params[TARGETS[0].b]))
    np.testing.assert_allclose(mine[TARGETS[0].a] @ mine[TARGETS[0].b], (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5)


@functools.partial(jax.jit, static_argnums=1)
def penalty(factors, first):
    total = 0.0
    for pair in PAIRS:
        total = total + jnp.linalg.norm(factors[pair.a][:, first:]) * jnp.linalg.norm(factors[pair.b][first:])
    return total


pull_of = jax.jit(jax.grad(penalty), static_argnums=1)


def test_het_lora_against_a_loop():
    """Regularized clients, of whom some prune and some do not, and one round's weighted sum of zero-padded factors."""
    whole, _, params = make("het")
    cohort = cohort_of(whole, params)
    state, metrics, report = play("het", cohort)
    ends, ranks = [], []
    for c in range(11):
        first, mine = pruned_rank(RANKS[c], 0.6), cut(jax.device_get(params), RANKS[c])

        def pull(f, first=first, whole=first == RANKS[c]):
            return {} if whole else jax.tree.map(lambda g: 0.05 * g, jax.device_get(pull_of(f, first)))

        end = local_sgd(mine, one(cohort, c), WEIGHT, pull)
        ranks.append(first if penalty(end, first) < penalty(mine, first) else RANKS[c])
        ends.append(pad(cut(end, ranks[-1])))
    assert 0 < sum(new < old for new, old in zip(ranks, RANKS)) < sum(r > 1 for r in RANKS)
    np.testing.assert_array_equal(without_padding(report.states.algorithm, 11), ranks)
    bits = lambda ranks: [factor_bits(params, PAIRS, r) for r in ranks]
    np.testing.assert_array_equal(without_padding(report.metrics["payload_bits"], 11), bits(ranks))
    np.testing.assert_array_equal(without_padding(report.metrics["download_bits"], 11), bits(RANKS))
    sizes = np.asarray([np.linalg.norm(change(end)) for end in ends])
    expected = {name: mean([end[name] for end in ends], sizes) for name in params}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), dict(state.params), expected)
    exact = mean([change(end) for end in ends], cohort.weights)
    np.testing.assert_allclose(metrics["aggregation_bias"], distance(change(expected), exact), rtol=1e-4)


def test_het_lora_keeps_the_columns_that_nobody_delivered_has():
    """Clients 0, 4 and 10 have rank 1: the server's other columns stay, and can still be trained later."""
    whole, _, params = make("het")
    cohort = cohort_of(whole, params)
    weights = np.where(np.isin(cohort.client_ids, [0, 4, 10]), cohort.weights, 0).astype(np.float32)
    state, _, report = play("het", cohort._replace(weights=weights))
    for pair in PAIRS:
        np.testing.assert_array_equal(state.params[pair.a][:, 1:], params[pair.a][:, 1:])
        np.testing.assert_array_equal(state.params[pair.b][1:], params[pair.b][1:])
        assert distance(state.params[pair.b][:1], params[pair.b][:1]) > 1e-3
    np.testing.assert_array_equal(
        without_padding(report.states.algorithm, 11), RANKS
    )  # who is not delivered does not prune


def test_pruned_ranks():
    assert [pruned_rank(r, 0.9) for r in (1, 2, 10, 20, 21)] == [1, 1, 9, 18, 18]
    assert [pruned_rank(r, 1.0) for r in (1, 7)] == [1, 7]


@pytest.mark.parametrize("optimizer", [optax.sgd(RATE, momentum=0.9), optax.adamw(0.1, weight_decay=0.1)])
def test_absent_ranks_have_no_gradient_and_stay_zero(optimizer):
    """Without any mask on the gradient."""
    params = keep_rank(start(), PAIRS, jnp.int32(2))
    batches = one(cohort_of(make("fedit")[0], params), 0)
    context = ClientContext(params, WEIGHT, (), jnp.int32(0), jnp.float32(1), None, jax.random.key(0))
    delta = run_client(fed_opt(grad_fn, optimizer).client, context, batches).update
    for pair in PAIRS:
        assert not np.any(delta[pair.a][:, 2:]) and not np.any(delta[pair.b][2:])
        assert np.all(delta[pair.a][:, :2]) and np.all(delta[pair.b][:2])


def test_fed_it_is_biased_by_what_the_metric_says():
    whole, _, params = make("fedit")
    cohort = cohort_of(whole, params)
    state, metrics, _ = play("fedit", cohort)
    ends = [local_sgd(params, one(cohort, c), WEIGHT) for c in range(11)]
    averaged = {name: mean([end[name] for end in ends], cohort.weights) for name in params}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), dict(state.params), averaged)
    exact = mean([change(end) for end in ends], cohort.weights)
    assert metrics["aggregation_bias"] > 0.01
    np.testing.assert_allclose(metrics["aggregation_bias"], distance(change(averaged), exact), rtol=1e-4)


def test_ffa_lora_is_exact_and_sends_b_only():
    params = start()
    b_loss, b_params, b_frozen = freeze_a(loss_fn, params, WEIGHT)
    assert sorted(b_params) == sorted(pair.b for pair in PAIRS)
    assert tree_bits(b_params) == 32 * 4 * (5 + 3)
    whole = make_round(fed_opt(jax.value_and_grad(b_loss), optax.sgd(RATE)))
    cohort = cohort_of(whole, b_params)
    state, *_ = pmap_round(whole)(replicate(whole.init(b_params, SEED)), replicate(b_frozen), put_on_devices(cohort))
    a = {pair.a: params[pair.a] for pair in PAIRS}
    deltas = []
    for c in range(11):
        mine = dict(params)
        for i in range(3):
            grad = gradient(mine, WEIGHT, jax.tree.map(lambda x: x[i], one(cohort, c)), None)[1]
            mine = a | {pair.b: mine[pair.b] - RATE * grad[pair.b] for pair in PAIRS}
        deltas.append(change(mine))
    assert distance(change(a | dict(state.params)), mean(deltas, cohort.weights)) < 1e-6
    batch = {"x": np.eye(6, dtype=np.float32), "y": np.zeros((6, 8), np.float32)}
    assert b_loss(state.params, b_frozen, batch, None) == loss_fn(a | dict(state.params), WEIGHT, batch, None)


@pytest.mark.parametrize("name", ["flora", "flex", "het", "fedit"])
def test_order_of_clients_and_scale_of_weights_change_nothing(name):
    whole, _, params = make(name)
    cohort = cohort_of(whole, params)
    order = np.random.default_rng(1).permutation(11)
    moved = jax.tree.map(lambda x: x[order], cohort)
    first, metrics, _ = play(name, cohort)
    second, same, _ = play(name, moved._replace(weights=4 * moved.weights))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), dict(first.params), dict(second.params))
    for metric in set(metrics) - {"examples"}:
        np.testing.assert_allclose(same[metric], metrics[metric], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["flora", "flex", "het", "fedit"])
def test_an_empty_cohort_leaves_the_server_as_it_was(name):
    whole, _, params = make(name)
    cohort = cohort_of(whole, params)
    state, metrics, _ = play(name, cohort._replace(weights=np.zeros(11, np.float32)))
    jax.tree.map(np.testing.assert_array_equal, dict(state.params), whole.init(params, SEED).params)
    over_nobody = {name for name, value in metrics.items() if np.isnan(value)}  # means of the clients' metrics
    assert over_nobody - {"loss", "payload_bits", "download_bits", "rank"} == set() and "loss" in over_nobody
    assert all(np.isfinite(metrics[name]) for name in set(metrics) - over_nobody) and metrics["delta_norm"] < 1e-6


@pytest.mark.parametrize("name", ["flora", "flex", "het"])
def test_a_single_client_is_the_aggregate(name):
    """Client 3 alone, of rank 4; one that is not finite beside it is dropped."""
    whole, _, params = make(name)
    cohort = cohort_of(whole, params)
    batches = {n: x.copy() for n, x in cohort.batches.items()}
    batches["y"][6] = np.nan
    weights = np.where(np.isin(cohort.client_ids, [3, 6]), cohort.weights, 0).astype(np.float32)
    state, metrics, _ = play(name, cohort._replace(weights=weights, batches=batches))
    assert metrics["dropped_clients"] == 1
    if name == "flora":
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), 0), 3)
        fresh = fresh_factors(start(), PAIRS, jax.random.fold_in(key, 2**31 - 5))
        expected = WEIGHT["m.weight"] + SCALE * change(local_sgd(fresh, one(cohort, 3), WEIGHT))
        assert distance(state.params["m.weight"], expected) < 1e-6
    elif name == "flex":
        assert distance(change(state.params), change(local_sgd(params, one(cohort, 3), WEIGHT))) < 1e-6
        assert metrics["aggregation_bias"] < 1e-6
    else:
        assert metrics["aggregation_bias"] < 1e-6 and metrics["rank"] in (2, 4)


def test_what_is_refused():
    sgd = optax.sgd(RATE)
    with pytest.raises(ValueError, match="no other aggregator"):
        make_round(flex_lora(grad_fn, sgd), aggregator=with_aggregation_bias(Aggregator()))
    with pytest.raises(ValueError, match="no codec"):
        make_round(flora(grad_fn, sgd, TARGETS, scale=1.0), transport=Transport(codec=identity()))
    with pytest.raises(ValueError, match="substitute_lost"):
        make_round(het_lora(grad_fn, sgd, gamma=0.9, regularization=0.0), transport=Transport(substitute_lost=True))
    with pytest.raises(ValueError, match="from 1 to the model's 4"):
        flex_lora(grad_fn, sgd, ranks=(4, 5)).init(start(), SEED)
    with pytest.raises(ValueError, match="only LoRA factors"):
        flex_lora(grad_fn, sgd).init(start() | {"norm": jnp.ones(3)}, SEED)
    with pytest.raises(ValueError, match="m.weight"):
        flora(grad_fn, sgd, TARGETS, scale=1.0).init(start(), SEED)
    with pytest.raises(ValueError, match="gamma"):
        het_lora(grad_fn, sgd, gamma=1.5, regularization=0.0)
    assert full_rank(start(), pairs_of(start())) == 4
