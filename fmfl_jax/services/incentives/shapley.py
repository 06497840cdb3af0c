"""What each client contributed: Shapley values of a cooperative game, exactly and by permutations; leave-one-out.

    phi_i = sum over S without i of |S|! (n - |S| - 1)! / n!  (v(S + i) - v(S))

The one division of v(all) - v(none) that is symmetric, additive and gives nothing to who changes nothing (Shapley
1953). A game is a function of a coalition, bool [n], and need not rise: a client that does harm gets less than 0.

    >>> exact_shapley(lambda coalition: math.sqrt(data[coalition].sum()), len(data))
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fmfl_jax.services.checks import at_least

Game = Callable[[np.ndarray], float]
"""v(coalition bool [n]) -> its worth."""
_MOST_EXACT = 20


class Estimate(NamedTuple):
    """values: float64 [n]. standard_errors: [n], of the permutations drawn. evaluations: coalitions whose worth was
    computed, each once."""

    values: np.ndarray
    standard_errors: np.ndarray
    evaluations: int


class Remembered:
    """A game that is asked for each coalition once. evaluations: how many so far."""

    def __init__(self, game: Game):
        self._game, self._known = game, {}

    def __call__(self, coalition: np.ndarray) -> float:
        key = np.packbits(coalition).tobytes()
        if key not in self._known:
            self._known[key] = float(self._game(coalition))
        return self._known[key]

    @property
    def evaluations(self) -> int:
        return len(self._known)


def exact_shapley(game: Game, num_players: int) -> np.ndarray:
    """All 2^n coalitions: float64 [n]. Raises ValueError for more than 20 players."""
    at_least(1, num_players=num_players)
    if num_players > _MOST_EXACT:
        raise ValueError(f"{num_players} players have 2^{num_players} coalitions: sample permutations")
    numbers = np.arange(2**num_players)
    members = (numbers[:, None] >> np.arange(num_players)) & 1 == 1  # [2^n, n]
    worth = np.asarray([float(game(coalition)) for coalition in members])
    return shapley_of_table(worth)


def shapley_of_table(worth) -> np.ndarray:
    """float64 [n] of the worth of all coalitions [2^n], player i's bit being 2^i."""
    worth = np.asarray(worth, np.float64)
    num = len(worth).bit_length() - 1
    numbers = np.arange(2**num)
    sizes = np.bitwise_count(numbers)
    share = np.asarray([1 / (num * math.comb(num - 1, s)) for s in range(num)])
    without = [numbers[(numbers >> i) & 1 == 0] for i in range(num)]
    return np.asarray([np.sum(share[sizes[s]] * (worth[s | 1 << i] - worth[s])) for i, s in enumerate(without)])


def leave_one_out(game: Game, num_players: int) -> np.ndarray:
    """v(all) - v(all but i): float64 [n]."""
    at_least(1, num_players=num_players)
    everybody = np.ones(num_players, bool)
    worth = float(game(everybody))
    return np.asarray([worth - float(game(everybody & (np.arange(num_players) != i))) for i in range(num_players)])


def permutation_shapley(
    game: Game, num_players: int, *, num_permutations: int, rng, tolerance: float | None = None
) -> Estimate:
    """The mean of what a player adds when players come in a random order (Castro, Gomez, Tejada 2009).

    tolerance: once what has come is worth as much as all to within it, nobody after adds anything (the truncation of
    Ghorbani, Zou, ICML 2019); the values then sum to v(all) - v(none) to within it, exactly without.
    rng: numpy Generator, or a seed.
    """
    at_least(1, num_players=num_players)
    at_least(2, num_permutations=num_permutations)
    rng, game = np.random.default_rng(rng), Remembered(game)
    drawn = [marginals(game, rng.permutation(num_players), tolerance) for _ in range(num_permutations)]
    errors = np.std(drawn, axis=0, ddof=1) / math.sqrt(num_permutations)
    return Estimate(np.mean(drawn, axis=0), errors, game.evaluations)


def marginals(game: Remembered, order: np.ndarray, tolerance: float | None) -> np.ndarray:
    """What each player adds when they come in this order: float64 [n]. What truncation skips is not evaluated, and not
    remembered as if it had been."""
    present, added = np.zeros(len(order), bool), np.zeros(len(order))
    worth, whole = game(present), game(np.ones(len(order), bool))
    for player in order:
        if tolerance is not None and abs(whole - worth) <= tolerance:
            break
        present[player] = True
        after = game(present)
        added[player], worth = after - worth, after
    return added
