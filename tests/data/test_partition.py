"""Properties of every partitioner, and what each is for."""

import numpy as np
import pytest

from fmfl_jax.data import partition

NUM_WINDOWS = 600
LABELS = np.repeat(np.arange(40), 15)

PARTITIONERS = {
    "random": lambda c, rng: partition.random_partition(NUM_WINDOWS, c, rng=rng),
    "dirichlet": lambda c, rng: partition.dirichlet_partition(LABELS, c, alpha=0.3, rng=rng),
    "dirichlet_tiny_alpha": lambda c, rng: partition.dirichlet_partition(LABELS, c, alpha=1e-3, rng=rng),
    "documents": lambda c, rng: partition.document_partition(LABELS, c, rng=rng),
    "lognormal": lambda c, rng: partition.quantity_skew_partition(
        NUM_WINDOWS, c, distribution="lognormal", skew=1.5, rng=rng
    ),
    "power_law": lambda c, rng: partition.quantity_skew_partition(
        NUM_WINDOWS, c, distribution="power_law", skew=2.0, rng=rng
    ),
}


def sizes(parts):
    return np.asarray([len(part) for part in parts])


@pytest.mark.parametrize("name", PARTITIONERS)
@pytest.mark.parametrize("num_clients", [1, 7, 40])
def test_every_window_once_and_deterministic(name, num_clients):
    for seed in range(5):
        parts = PARTITIONERS[name](num_clients, seed)
        assert len(parts) == num_clients and sizes(parts).min() >= 1
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(NUM_WINDOWS))
        assert all((np.diff(part) > 0).all() for part in parts)
        again = PARTITIONERS[name](num_clients, np.random.default_rng(seed))
        assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
        if num_clients > 1:
            other = PARTITIONERS[name](num_clients, seed + 1)
            assert any(not np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


@pytest.mark.parametrize("name", PARTITIONERS)
def test_more_clients_than_windows(name):
    with pytest.raises(ValueError, match="601 clients but only 600 windows"):
        PARTITIONERS[name](601, 0)
    with pytest.raises(ValueError, match="num_clients is 0"):
        PARTITIONERS[name](0, 0)


@pytest.mark.parametrize("name", [name for name in PARTITIONERS if name != "documents"])
def test_as_many_clients_as_windows(name):
    assert (sizes(PARTITIONERS[name](NUM_WINDOWS, 0)) == 1).all()


def test_random_sizes_differ_by_at_most_one():
    assert np.unique(sizes(partition.random_partition(103, 20, rng=0))).tolist() == [5, 6]


def test_dirichlet_alpha_sets_the_mixture():
    """With labels l over clients c, E[share^2] per label is (alpha + 1) / (C alpha + 1) for Dirichlet(alpha)."""
    labels, num_clients = np.repeat(np.arange(300), 100), 10
    for alpha in (0.1, 1.0, 100.0):
        parts = partition.dirichlet_partition(labels, num_clients, alpha=alpha, rng=0)
        share = np.stack([np.bincount(labels[part], minlength=300) for part in parts]) / 100
        expected = (alpha + 1) / (num_clients * alpha + 1)
        np.testing.assert_allclose((share**2).sum(0).mean(), expected, rtol=0.05)


def test_dirichlet_min_size():
    parts = partition.dirichlet_partition(LABELS, 60, alpha=1e-3, min_size=10, rng=0)
    assert (sizes(parts) == 10).all()
    assert sizes(partition.dirichlet_partition(LABELS, 20, alpha=0.05, min_size=8, rng=0)).min() == 8
    with pytest.raises(ValueError, match="min_size is 11"):
        partition.dirichlet_partition(LABELS, 60, alpha=1.0, min_size=11, rng=0)
    with pytest.raises(ValueError, match="alpha"):
        partition.dirichlet_partition(LABELS, 60, alpha=0.0, rng=0)


def test_documents_stay_whole():
    document_id = np.random.default_rng(0).choice([3, 5, 8, 13, 21], 200)
    parts = partition.document_partition(document_id, 3, rng=0)
    held = [set(document_id[part].tolist()) for part in parts]
    assert sorted(map(len, held)) == [1, 2, 2] and set.union(*held) == {3, 5, 8, 13, 21}
    with pytest.raises(ValueError, match="6 clients but only 5 documents"):
        partition.document_partition(document_id, 6, rng=0)


def test_quantity_skew_sizes():
    """Power law: sizes are 1 + the rest in proportion to rank^-skew, up to one; skew 0 is equal."""
    skewed = partition.quantity_skew_partition(10_000, 50, distribution="power_law", skew=1.2, rng=0)
    weights = np.arange(1.0, 51) ** -1.2
    np.testing.assert_allclose(np.sort(sizes(skewed))[::-1], 1 + 9950 * weights / weights.sum(), atol=1)
    for distribution in ("lognormal", "power_law"):
        equal = partition.quantity_skew_partition(103, 20, distribution=distribution, skew=0.0, rng=0)
        assert np.unique(sizes(equal)).tolist() == [5, 6]
    # Of 10 windows 5.45, 2.73 and 1.82 are due beside the one for each: the largest remainders get the rest.
    small = partition.quantity_skew_partition(13, 3, distribution="power_law", skew=1.0, rng=0)
    assert sorted(sizes(small)) == [3, 4, 6]
    normal = sizes(partition.quantity_skew_partition(10**6, 2000, distribution="lognormal", skew=0.7, rng=0))
    np.testing.assert_allclose(np.std(np.log(normal)), 0.7, rtol=0.05)
    with pytest.raises(ValueError, match="distribution"):
        partition.quantity_skew_partition(10, 2, distribution="normal", skew=1.0, rng=0)
    with pytest.raises(ValueError, match="skew"):
        partition.quantity_skew_partition(10, 2, distribution="lognormal", skew=-1.0, rng=0)
