"""Partitioners: which windows of the training text each client holds.

Each returns one sorted int64 array of window numbers per client; together they hold every window exactly once, and no
client is empty. `rng` is a numpy Generator, or a seed for one; equal seeds give equal partitions. All raise ValueError
where there are more clients than windows.
"""

import numpy as np

Rng = np.random.Generator | int


def random_partition(num_windows: int, num_clients: int, *, rng: Rng) -> list[np.ndarray]:
    """Windows dealt at random, in equal numbers up to one (IID; the case study of the paper)."""
    _check(num_windows, num_clients)
    order = np.random.default_rng(rng).permutation(num_windows)
    return [np.sort(part) for part in np.array_split(order, num_clients)]


def dirichlet_partition(
    labels: np.ndarray, num_clients: int, *, alpha: float, min_size: int = 1, rng: Rng
) -> list[np.ndarray]:
    """Each label's windows spread over the clients in proportions drawn from Dirichlet(alpha).

    Small alpha: a client sees few labels, and clients differ in size; large alpha: IID. With document ids as labels it
    spreads documents. The idea of Hsu, Qi, Brown 2019 (arXiv:1909.06335), who draw a mixture of labels per client and
    keep the clients equally large; this is the form per label of Yurochkin et al. 2019 (arXiv:1905.12022), which also
    makes the sizes unequal. Where those draw again until the smallest client has min_size windows, random windows move
    here from the largest client to the small ones: that ends for any alpha and number of clients.

    Args:
      labels: int [num_windows], label (or document) of each window.
      alpha: concentration, above 0.
      min_size: the least number of windows of a client, at least 1.
    """
    labels = np.asarray(labels)
    _check(len(labels), num_clients)
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}: expected a number above 0")
    if min_size < 1 or min_size * num_clients > len(labels):
        raise ValueError(
            f"min_size is {min_size}: expected 1 to {len(labels) // num_clients} "
            f"({len(labels)} windows for {num_clients} clients)"
        )
    rng = np.random.default_rng(rng)
    client = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        ends = np.cumsum(rng.dirichlet(np.full(num_clients, alpha)))
        # Member k goes to the client in whose stretch of [0, 1] the middle of the k-th of len(members) steps lies.
        middles = (np.arange(len(members)) + 0.5) / len(members)
        client[members] = np.minimum(np.searchsorted(ends, middles), num_clients - 1)
    _raise_to_min_size(client, num_clients, min_size, rng)
    return _by_client(client, num_clients)


def document_partition(document_id: np.ndarray, num_clients: int, *, rng: Rng) -> list[np.ndarray]:
    """Whole documents dealt to the clients in random order, in equal numbers up to one ("natural" partition).

    Args:
      document_id: int [num_windows], document of each window. Needs at least as many documents as clients.
    """
    document_id = np.asarray(document_id)
    _check(len(document_id), num_clients)
    documents, place = np.unique(document_id, return_inverse=True)
    _check(len(documents), num_clients, unit="documents")
    owner = np.random.default_rng(rng).permutation(len(documents)) % num_clients
    return _by_client(owner[place], num_clients)


def quantity_skew_partition(
    num_windows: int, num_clients: int, *, distribution: str, skew: float, rng: Rng
) -> list[np.ndarray]:
    """Random windows, in unequal numbers: one for each client, the rest in proportion to weights.

    Args:
      distribution: "lognormal": weights exp(skew * N(0, 1)); "power_law": weights rank^-skew, ranks dealt at random.
      skew: at least 0; 0 makes the clients equal up to one.
    """
    _check(num_windows, num_clients)
    if not skew >= 0:
        raise ValueError(f"skew is {skew}: expected a number of at least 0")
    rng = np.random.default_rng(rng)
    if distribution == "lognormal":
        log_weights = skew * rng.standard_normal(num_clients)
    elif distribution == "power_law":
        log_weights = -skew * np.log(1.0 + rng.permutation(num_clients))
    else:
        raise ValueError(f'distribution is {distribution!r}: expected "lognormal" or "power_law"')
    weights = np.exp(log_weights - log_weights.max())  # The largest is 1: no overflow.
    share = weights / weights.sum() * (num_windows - num_clients)
    sizes = np.floor(share).astype(np.int64)
    # What rounding down left over goes to the largest remainders.
    left_over = num_windows - num_clients - int(sizes.sum())
    sizes[np.argsort(sizes - share, kind="stable")[:left_over]] += 1
    return [np.sort(part) for part in np.split(rng.permutation(num_windows), np.cumsum(sizes + 1)[:-1])]


def _check(count: int, num_clients: int, unit: str = "windows") -> None:
    if num_clients < 1:
        raise ValueError(f"num_clients is {num_clients}: expected at least 1")
    if num_clients > count:
        raise ValueError(f"{num_clients} clients but only {count} {unit}: every client needs at least one")


def _raise_to_min_size(client: np.ndarray, num_clients: int, min_size: int, rng: np.random.Generator) -> None:
    """Moves random windows (client: int64 [num_windows], changed in place) until every client has min_size."""
    sizes = np.bincount(client, minlength=num_clients)
    held = {}  # windows of the clients that give, shuffled
    for taker in np.flatnonzero(sizes < min_size):
        while sizes[taker] < min_size:
            giver = int(np.argmax(sizes))
            if giver not in held:
                held[giver] = rng.permutation(np.flatnonzero(client == giver)).tolist()
            client[held[giver].pop()] = taker
            sizes[giver] -= 1
            sizes[taker] += 1


def _by_client(client: np.ndarray, num_clients: int) -> list[np.ndarray]:
    """int64 [num_windows] owners -> sorted window numbers per client."""
    order = np.argsort(client, kind="stable")
    return np.split(order, np.cumsum(np.bincount(client, minlength=num_clients))[:-1])
