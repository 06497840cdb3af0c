"""The race against the comparison of all candidates on all tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.quant.race import TOLERANCE, race


def run(losses):
    """(winner, number of losses [tokens] that were computed): losses [candidates, passes, tokens]."""
    computed = []

    def loss(c, i):
        jax.debug.callback(lambda c, i: computed.append((int(c), int(i))), c, i)
        return jnp.asarray(losses, jnp.float32)[c, i]

    winner = int(jax.jit(lambda: race(loss, *losses.shape[:2]))())
    jax.effects_barrier()
    assert len(computed) == len(set(computed))
    return winner, len(computed)


@pytest.mark.parametrize("seed", range(5))
def test_winner_is_the_best_of_all_tokens_within_the_tolerance(seed):
    """Losses as in a search of scales: a token's size common to all candidates, and noise of each."""
    rng = np.random.default_rng(seed)
    mean = 1 + 0.3 * np.abs(np.linspace(-1, 1.5, 20)) + 0.01 * rng.random(20)
    tokens = rng.gamma(1.0, size=(1, 16, 200))
    losses = mean[:, None, None] * tokens * rng.uniform(0.7, 1.3, size=(20, 16, 200))
    winner, computed = run(losses)
    totals = losses.sum((1, 2))
    assert totals[winner] <= (1 + TOLERANCE) * totals.min()
    assert computed < 0.4 * 20 * 16


def test_a_lead_by_chance_does_not_end_the_race():
    losses = np.random.default_rng(0).gamma(1.0, size=(2, 8, 50))
    losses[0, 0] *= 0.9 * losses[1, 0].sum() / losses[0, 0].sum()  # a lead of less than three standard errors
    losses[0, 1:] *= 1.5
    assert run(losses)[0] == 1


def test_one_pass_compares_all():
    assert run(np.array([3.0, 2.0, 2.001, 5.0])[:, None, None]) == (1, 4)
