"""GTG-Shapley: the clients' contributions to a round from the updates they sent, without training anything again (Liu,
Chen, Yu, Liu, Cui, ACM TIST 2022).

A coalition's model is the server's before the round moved by the mean of the coalition's updates; its worth is how well
that model does. A round that changed the model's worth by no more than a tolerance gives nobody anything (truncation
between rounds), a permutation ends where the rest adds no more than one (within a round), and permutations are guided:
each client comes first equally often. A round that made the model worse is divided like any other, with what is
negative going to who did it.

    >>> contribution = gtg_shapley(lambda coalition: -loss(coalition_model(coalition)), num_clients, rng=seed)
"""

from typing import NamedTuple

import numpy as np

from fmfl_jax.services.checks import at_least
from fmfl_jax.services.incentives.shapley import Game, Remembered, marginals


class Contribution(NamedTuple):
    """values: float64 [n] in the order of the round's clients. skipped: the round changed too little to look into it.
    converged: the estimate had settled before the permutations ran out. evaluations: models evaluated."""

    values: np.ndarray
    skipped: bool
    converged: bool
    evaluations: int


def gtg_shapley(
    game: Game,
    num_clients: int,
    *,
    rng,
    round_tolerance: float = 0.0,
    tolerance: float | None = None,
    convergence: float = 0.05,
    most_cycles: int = 20,
) -> Contribution:
    """The Shapley values of a round's clients.

    game: v(coalition bool [n]) of the models rebuilt from updates; v(none) is the server's model before the round.
    round_tolerance, tolerance: between and within rounds, in the units of v; 0 skips only a round that changed nothing,
    None truncates no permutation. A cycle is n permutations, one with each client first; cycles end where the
    estimate's change over its size falls to `convergence`, or after most_cycles. rng: numpy Generator, or a seed.
    """
    at_least(1, num_clients=num_clients, most_cycles=most_cycles)
    at_least(0, round_tolerance=round_tolerance, convergence=convergence)
    rng, game = np.random.default_rng(rng), Remembered(game)
    change = game(np.ones(num_clients, bool)) - game(np.zeros(num_clients, bool))
    if abs(change) <= round_tolerance:
        return Contribution(np.zeros(num_clients), True, True, game.evaluations)
    total, before, converged = np.zeros(num_clients), None, num_clients == 1
    for cycle in range(1, most_cycles + 1):
        for first in range(num_clients):
            rest = rng.permutation(np.delete(np.arange(num_clients), first))
            total += marginals(game, np.append(first, rest), tolerance)
        estimate = total / (cycle * num_clients)
        if before is not None:
            converged = np.abs(estimate - before).sum() <= convergence * np.abs(estimate).sum()
        before = estimate
        if converged:
            break
    assert before is not None  # there was a cycle
    return Contribution(before, False, bool(converged), game.evaluations)
