"""LoRA's factors: sums, truncations and norms against dense numpy, PEFT's "cat", and the metric of the bias."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.fed.algorithms.lora import factors
from fmfl_jax.fed.algorithms.lora.bias import with_aggregation_bias
from fmfl_jax.fed.algorithms.lora.factors import Factors, Pair
from fmfl_jax.fed.core.types import Aggregator, GatheredUpdates

GOLDEN = pathlib.Path(__file__).parents[3] / "golden" / "lora_cat.npz"
PAIR = Pair("q.lora_a", "q.lora_b")


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dense(a, b, shares):
    """sum_c shares_c A_c B_c in float64."""
    return np.einsum("c,cdr,crf->df", *(np.asarray(x, np.float64) for x in (shares, a, b)))


def product(pair: Factors):
    return np.asarray(pair.a, np.float64) @ np.asarray(pair.b, np.float64)


def distance(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def test_the_stack_of_clients_of_three_ranks_is_what_peft_cat_gives():
    golden = np.load(GOLDEN)
    pad = lambda x, axis: np.pad(x, [(0, 4 - x.shape[i] if i == axis else 0) for i in range(2)])
    a = np.stack([pad(golden[f"a{i}"], 1) for i in range(3)])
    b = np.stack([pad(golden[f"b{i}"], 0) for i in range(3)])
    assert distance(2 * product(factors.stack_factors(a, b, golden["weights"])), golden["delta"]) < 1e-6


def test_what_has_no_share_is_absent_whatever_it_is():
    a, b, shares = draw(4, 6, 2), draw(4, 2, 5, seed=1), np.asarray([0.3, 0, 0.7, 0], np.float32)
    expected = dense(a, b, shares)
    a[1], b[3] = np.nan, np.inf
    assert distance(product(factors.stack_factors(a, b, shares)), expected) < 1e-6


def test_at_full_rank_nothing_is_lost():
    """20 clients of rank 8 in 512 x 384: 160 directions. The SVD's own vectors would leave more than 1e-6."""
    a, b, shares = draw(20, 512, 8), draw(20, 8, 384, seed=1), np.full(20, 0.05, np.float32)
    kept, _ = factors.truncated_svd(factors.stack_factors(a, b, shares), 160)
    assert distance(product(kept), dense(a, b, shares)) < 8e-7


@pytest.mark.parametrize("clients, rank", [(2, 3), (5, 3), (5, 9)])
def test_truncation_is_that_of_the_dense_svd(clients, rank):
    """Of rank 6 in 7 x 8, of rank 7, and with more directions asked for than there are."""
    a, b = draw(clients, 7, 3), draw(clients, 3, 8, seed=1)
    shares = np.full(clients, 1 / clients, np.float32)
    whole = dense(a, b, shares)
    kept, values = factors.truncated_svd(factors.stack_factors(a, b, shares), rank)
    u, s, vt = np.linalg.svd(whole, full_matrices=False)
    np.testing.assert_allclose(product(kept), (u[:, :rank] * s[:rank]) @ vt[:rank], atol=2e-6 * s[0])
    np.testing.assert_allclose(values, s[: len(values)], atol=1e-6 * s[0])
    assert kept.a.shape == (7, rank) and kept.b.shape == (rank, 8)
    there = min(rank, 7, 3 * clients)
    np.testing.assert_allclose(kept.a.T @ kept.a, np.diag(np.arange(rank) < there).astype(np.float32), atol=1e-6)


def test_directions_without_singular_value_can_be_trained():
    """A client that sends rank 1: the server's other columns of A are not zero, so that B has a gradient."""
    one = Factors(draw(6, 3) * np.asarray([1, 0, 0], np.float32), draw(3, 5, seed=1))
    kept, _ = factors.truncated_svd(one, 3)
    np.testing.assert_allclose(kept.b[1:], 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(kept.a, axis=0), 1, atol=1e-6)


def test_norms_and_distances():
    first, second = Factors(draw(20, 4), draw(4, 9, seed=1)), Factors(draw(20, 6, seed=2), draw(6, 9, seed=3))
    np.testing.assert_allclose(factors.factored_norm(first), np.linalg.norm(product(first)), rtol=1e-6)
    expected = distance(np.stack([product(first), product(second)]), np.stack([product(second), product(first)]))
    np.testing.assert_allclose(factors.relative_distance([first, second], [second, first]), expected, rtol=1e-6)


def test_equal_matrices_of_different_factors_are_at_no_distance():
    """Gram matrices would leave 1e-4 here."""
    first, turn = Factors(draw(20, 4), draw(4, 9, seed=1)), draw(4, 4, seed=2)
    second = Factors(first.a @ turn, np.linalg.solve(turn.astype(np.float64), first.b).astype(np.float32))
    assert 0 < factors.relative_distance([first], [second]) < 3e-6
    nothing = Factors(jnp.zeros((20, 4), jnp.float32), first.b)
    assert factors.relative_distance([nothing], [nothing]) == 0


def gathered_deltas(server_a, server_b, a, b, weights, denominators=None):
    updates = {PAIR.a: server_a - a, PAIR.b: server_b - b}
    weights = np.asarray(weights, np.float32)
    return GatheredUpdates(
        updates,
        weights,
        weights if denominators is None else denominators,
        {},
        params={PAIR.a: server_a, PAIR.b: server_b},
    )


def bias_of(gathered, aggregator=Aggregator()):
    update, metrics = jax.jit(lambda s: with_aggregation_bias(aggregator).aggregate(s, (), None))(gathered)
    return update, float(metrics["aggregation_bias"])


@pytest.mark.parametrize("weight", [0.5, 0.2])
def test_bias_of_averaging_two_orthogonal_clients(weight):
    """A_1 B_1 = e1 e1^T, A_2 B_2 = e2 e2^T: exact diag(w, v), averaged (w e1 + v e2)(w e1 + v e2)^T, v = 1 - w."""
    a = np.eye(2, dtype=np.float32)[:, :, None]  # [C, 2, 1]
    gathered = gathered_deltas(draw(2, 1), draw(1, 2, seed=1), a, a.transpose(0, 2, 1), [weight, 1 - weight])
    update, bias = bias_of(gathered)
    shares = np.asarray([weight, 1 - weight])
    made = (gathered.params[PAIR.a] - update[PAIR.a]) @ (gathered.params[PAIR.b] - update[PAIR.b])
    np.testing.assert_allclose(made, np.outer(shares, shares), atol=1e-6)
    np.testing.assert_allclose(bias, distance(np.outer(shares, shares), np.diag(shares)), rtol=1e-6)
    exact = factors.stack_factors(a, a.transpose(0, 2, 1), shares.astype(np.float32))
    np.testing.assert_allclose(product(exact), np.diag(shares), atol=1e-7)


def test_bias_where_there_is_none():
    """One client; equal A; nobody."""
    server = draw(6, 2), draw(2, 5, seed=1)
    a, b = draw(3, 6, 2, seed=2), draw(3, 2, 5, seed=3)
    assert bias_of(gathered_deltas(*server, a, b, [0, 4, 0]))[1] < 1e-6
    assert bias_of(gathered_deltas(*server, np.broadcast_to(server[0], a.shape), b, [1, 2, 3]))[1] < 1e-6
    assert bias_of(gathered_deltas(*server, a, b, [0, 0, 0]))[1] < 1e-6
    assert bias_of(gathered_deltas(*server, a, b, [1, 2, 3]))[1] > 0.1


def test_bias_of_any_aggregator_and_any_weights_against_numpy():
    """A coordinate-wise median, and weights that the denominators exceed: the server's matrix has the rest."""
    server, a, b = (draw(6, 2), draw(2, 5, seed=1)), draw(3, 6, 2, seed=2), draw(3, 2, 5, seed=3)
    median = Aggregator(
        aggregate=lambda gathered, state, key: (jax.tree.map(lambda x: jnp.median(x, axis=0), gathered.updates), {})
    )
    gathered = gathered_deltas(*server, a, b, [1, 2, 3], denominators=np.asarray([1, 2, 5], np.float32))
    exact = dense(a, b, [1 / 8, 2 / 8, 3 / 8]) + 2 / 8 * server[0].astype(np.float64) @ server[1]
    made = np.median(a, axis=0).astype(np.float64) @ np.median(b, axis=0)
    np.testing.assert_allclose(bias_of(gathered, median)[1], distance(made, exact), rtol=1e-5)


def test_pairs_by_name():
    params = {"l.1.lora_b": draw(2, 5), "l.1.lora_a": draw(6, 2), "l.0.lora_a": draw(4, 2), "l.0.lora_b": draw(2, 4)}
    pairs = factors.pairs_of(params)
    assert pairs == (Pair("l.0.lora_a", "l.0.lora_b"), Pair("l.1.lora_a", "l.1.lora_b"))
    assert factors.full_rank(params, pairs) == 2
    assert factors.factor_bits(params, pairs, 3) == 32 * 3 * (6 + 5 + 4 + 4)
    with pytest.raises(ValueError, match="l.1.lora_a and lora_b"):
        factors.pairs_of({name: x for name, x in params.items() if name != "l.1.lora_b"})
    with pytest.raises(ValueError, match="norm is trained"):
        factors.full_rank(params | {"norm": draw(3)}, pairs)
    with pytest.raises(ValueError, match="no lora_a"):
        factors.pairs_of({"soft_prompt": draw(3, 3)})
