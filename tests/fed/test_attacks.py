"""Attacks against their formulas in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from fmfl_jax.fed import attacks
from fmfl_jax.fed.core.types import GatheredUpdates

CLIENTS = 9
MALICIOUS = np.asarray([0, 1, 0, 0, 1, 0, 1, 0, 1], bool)
PRESENT = np.asarray([1, 1, 1, 0, 1, 1, 0, 1, 1], bool)  # client 6 is malicious and absent


def gathered_of(seed=0):
    rng = np.random.default_rng(seed)
    mask = lambda x: (x * PRESENT.reshape(-1, *(1,) * (x.ndim - 1))).astype(np.float32)
    updates = {"a": mask(rng.normal(size=(CLIENTS, 3, 2))), "b": mask(2.0 + rng.normal(size=CLIENTS))}
    weights = np.where(PRESENT, rng.integers(1, 9, CLIENTS), 0).astype(np.float32)
    return jax.tree.map(jnp.asarray, GatheredUpdates(updates, weights, weights, {"malicious": MALICIOUS}))


SENDING = MALICIOUS & PRESENT
BENIGN = ~MALICIOUS & PRESENT
EXPECTED = {
    "sign_flip": (attacks.sign_flip(3.0), lambda x: -3.0 * x[SENDING]),
    "scaling": (attacks.scaling(10.0), lambda x: 10.0 * x[SENDING]),
    "alie_z": (attacks.alie(1.5), lambda x: x[BENIGN].mean(0) - 1.5 * x[BENIGN].std(0)),
    # n = 7, m = 3: s = floor(4.5) - 3 = 1, z = quantile of (4 - 1) / 4.
    "alie": (attacks.alie(), lambda x: x[BENIGN].mean(0) - scipy.stats.norm.ppf(0.75) * x[BENIGN].std(0)),
    "inner_product": (attacks.inner_product(0.5), lambda x: -0.5 * x[BENIGN].mean(0)),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_against_the_formula(name):
    attack, formula = EXPECTED[name]
    gathered = gathered_of()
    got = jax.jit(attack)(gathered, jnp.asarray(MALICIOUS), jax.random.key(0))
    for leaf, before in zip(jax.tree.leaves(got), jax.tree.leaves(gathered.updates)):
        assert leaf.dtype == before.dtype
        before = np.asarray(before, np.float64)
        np.testing.assert_array_equal(leaf[~SENDING], before[~SENDING])
        expected = np.broadcast_to(formula(before), before[SENDING].shape)
        np.testing.assert_allclose(leaf[SENDING], expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "num_malicious, expected",
    [
        (1, 0.0),  # 9 benign, s = 5: the formula gives a negative z
        (2, 0.0),  # 8 benign, s = 4: the half
        (3, scipy.stats.norm.ppf(4 / 7)),
        (4, scipy.stats.norm.ppf(4 / 6)),
        (5, scipy.stats.norm.ppf(4 / 5)),
        (7, scipy.stats.norm.ppf(0.9999)),  # a majority needs no supporters
    ],
)
def test_alie_published_shift(num_malicious, expected):
    values = np.arange(10, dtype=np.float32)
    malicious = values < num_malicious
    gathered = GatheredUpdates({"w": jnp.asarray(values)}, jnp.ones(10), jnp.ones(10), {})
    sent = attacks.alie()(gathered, jnp.asarray(malicious), None)["w"][0]
    benign = values[~malicious]
    assert float((benign.mean() - sent) / benign.std()) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_gaussian_replaces_updates_by_noise():
    rng = np.random.default_rng(0)
    updates = {"a": jnp.asarray(rng.normal(size=(4, 2000)), jnp.float32), "b": jnp.full((4, 2000), 5.0)}
    gathered = GatheredUpdates(updates, jnp.ones(4), jnp.ones(4), {}, client_ids=jnp.arange(4))
    malicious = jnp.asarray([True, False, True, False])
    got = attacks.gaussian(3.0)(gathered, malicious, jax.random.key(1))
    rows = np.stack([np.asarray(got[name])[i] for name in "ab" for i in (0, 2)])
    for row in rows:
        assert scipy.stats.kstest(row, scipy.stats.norm(scale=3.0).cdf).pvalue > 1e-3
    assert np.max(np.abs(np.corrcoef(rows) - np.eye(4))) < 0.1  # leaves and clients draw apart
    np.testing.assert_array_equal(got["b"][1::2], updates["b"][1::2])
    again = attacks.gaussian(3.0)(gathered, malicious, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, got, again)


@pytest.mark.parametrize("name", EXPECTED)
def test_nobody_benign_or_nobody_at_all_stays_finite(name):
    attack, _ = EXPECTED[name]
    gathered = gathered_of()
    for weights in (gathered.weights, jnp.zeros(CLIENTS)):
        got = attack(gathered._replace(weights=weights), jnp.ones(CLIENTS, bool), jax.random.key(0))
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(got))


def test_who_is_malicious():
    small, large = (attacks.malicious_clients(50, fraction, seed=3) for fraction in (0.1, 0.3))
    assert small.sum() == 5 and large.sum() == 15 and np.all(large[small])
    np.testing.assert_array_equal(small, attacks.malicious_clients(50, 0.1, seed=3))
    assert np.any(small != attacks.malicious_clients(50, 0.1, seed=4))
    assert attacks.malicious_clients(7, 0.0, 0).sum() == 0 and attacks.malicious_clients(7, 1.0, 0).all()
    with pytest.raises(ValueError, match="fraction"):
        attacks.malicious_clients(5, 1.2, 0)


def test_flipped_labels():
    labels = np.arange(12, dtype=np.int32).reshape(3, 4) % 5
    flipped = attacks.flip_labels(labels, np.asarray([False, True, False]), 5)
    np.testing.assert_array_equal(flipped[1], 4 - labels[1])
    np.testing.assert_array_equal(flipped[::2], labels[::2])
    assert flipped.dtype == labels.dtype
    np.testing.assert_array_equal(attacks.flip_labels(attacks.flip_labels(labels, True, 5), True, 5), labels)
    with pytest.raises(ValueError, match="labels"):
        attacks.flip_labels(labels, True, 4)


def test_permuted_vocabulary():
    tokens = np.random.default_rng(0).integers(0, 100, (3, 40, 6)).astype(np.int32)
    malicious = np.asarray([True, False, True])
    got = attacks.permute_vocabulary(tokens, malicious, 100, seed=5)
    assert got.dtype == tokens.dtype
    np.testing.assert_array_equal(got[1], tokens[1])
    image = attacks.permute_vocabulary(np.arange(100), True, 100, seed=5)  # the permutation itself
    assert sorted(image) == list(range(100)) and np.mean(image == np.arange(100)) < 0.1
    np.testing.assert_array_equal(got[::2], image[tokens[::2]])
    assert np.any(image != attacks.permute_vocabulary(np.arange(100), True, 100, seed=6))
    with pytest.raises(ValueError, match="tokens"):
        attacks.permute_vocabulary(tokens, True, 50, seed=5)
