"""ComFedSV: contributions over a whole run in which few clients take part at a time (Fan, Fang, Zhou et al., ICDE
2022).

The worth U[t, S] of coalition S in round t is known only where all of S took part. Valuing a client only in its own
rounds pays equal clients unequally, by the luck of the draw. The matrix of all rounds and coalitions is close to one of
low rank, since rounds resemble each other: it is completed,

    minimize  sum over the known (U[t, S] - w_t . h_S)^2 + ridge (|W|^2 + |H|^2)

and the Shapley values of sum_t U[t, .] are taken over sampled permutations. Every coalition must be seen once, so
everybody takes part in the first round.

    >>> columns = draw_columns(num_clients, num_permutations=50, rng=seed)
    >>> utilities[t, columns.within(present)] = ...          # NaN elsewhere
    >>> completed_shapley(columns, utilities)
"""

from typing import NamedTuple

import numpy as np

from fmfl_jax.services.checks import at_least, positive


class Columns(NamedTuple):
    """The coalitions that permutations of the clients pass through. orders: int [M, n]. coalitions: bool [U, n], each
    once, not the empty one. prefix: int [M, n], the coalition after each step of each order."""

    orders: np.ndarray
    coalitions: np.ndarray
    prefix: np.ndarray

    def within(self, present) -> np.ndarray:
        """Numbers of the coalitions all of whose clients are present, bool [n]."""
        return np.flatnonzero(~np.any(self.coalitions & ~np.asarray(present, bool)[None], axis=1))


def draw_columns(num_clients: int, *, num_permutations: int, rng) -> Columns:
    """Random orders, with each client first, and last, about equally often. rng: numpy Generator, or a seed."""
    at_least(1, num_clients=num_clients, num_permutations=num_permutations)
    rng, orders = np.random.default_rng(rng), []
    while len(orders) < num_permutations:
        order = rng.permutation(num_clients)
        orders += [np.roll(order, i) for i in range(num_clients)]
    orders = np.asarray(orders[:num_permutations])
    member = np.arange(num_clients)[None, None] == orders[:, :, None]  # [M, step, n]
    prefixes = np.cumsum(member, axis=1).astype(bool).reshape(-1, num_clients)
    coalitions, prefix = np.unique(prefixes, axis=0, return_inverse=True)
    return Columns(orders, coalitions, prefix.reshape(orders.shape))


def completed_shapley(
    columns: Columns, utilities, *, rank: int = 3, ridge: float = 1e-4, sweeps: int = 100
) -> np.ndarray:
    """The clients' values over all rounds: float64 [n].

    utilities: float [T, U], NaN where not known; of the empty coalition 0. Raises ValueError where a coalition was
    never seen: nothing can be said of it.
    """
    utilities = np.asarray(utilities, np.float64)
    if utilities.ndim != 2 or utilities.shape[1] != len(columns.coalitions):
        raise ValueError(f"utilities must be [rounds, {len(columns.coalitions)}], got shape {utilities.shape}")
    known = np.isfinite(utilities)
    if not known.any(axis=0).all():
        raise ValueError("some coalitions were never seen together: all clients must take part in one round")
    whole = complete(utilities, rank=rank, ridge=ridge, sweeps=sweeps).sum(axis=0)  # [U]
    along = np.concatenate([np.zeros((len(columns.orders), 1)), whole[columns.prefix]], axis=1)
    added = np.zeros(columns.coalitions.shape[1])
    np.add.at(added, columns.orders, np.diff(along, axis=1))
    return added / len(columns.orders)


def complete(utilities: np.ndarray, *, rank: int, ridge: float, sweeps: int) -> np.ndarray:
    """The matrix [T, U] with its NaN filled in by alternating least squares; what is known stays as it is.

    ridge: over the mean square of what is known, for each number known of a row or column.
    """
    positive(rank=rank, ridge=ridge, sweeps=sweeps)
    known = np.isfinite(utilities)
    values = np.where(known, utilities, 0.0)
    scale = float(np.sqrt(np.mean(values[known] ** 2))) or 1.0
    values, rank = values / scale, min(rank, *values.shape)
    rng = np.random.default_rng(0)  # where the sweeps start; they end in the same place
    right = np.abs(rng.normal(size=(values.shape[1], rank)))
    left = np.zeros((values.shape[0], rank))
    for _ in range(sweeps):
        left = _fit(values, known, right, ridge)
        right = _fit(values.T, known.T, left, ridge)
    return np.where(known, utilities, scale * (left @ right.T))


def _fit(values: np.ndarray, known: np.ndarray, factors: np.ndarray, ridge: float) -> np.ndarray:
    """Each row's least squares on the factors of what it knows: [R, rank]."""
    rank = factors.shape[1]
    outer = (factors[:, :, None] * factors[:, None]).reshape(-1, rank * rank)
    gram = (known.astype(np.float64) @ outer).reshape(-1, rank, rank)
    gram += ridge * np.maximum(known.sum(axis=1), 1)[:, None, None] * np.eye(rank)[None]
    return np.linalg.solve(gram, (values @ factors)[:, :, None])[:, :, 0]
