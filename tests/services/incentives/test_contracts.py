"""Menus against a general solver with every constraint written out; types that fall are pooled or refused."""

import numpy as np
import pytest
from scipy import optimize

from fmfl_jax.services.incentives.contracts import (
    Menu,
    choose,
    rents_usd,
    screening_menu,
    server_utility_usd,
)

GOLDEN = ([1.0, 2.0, 4.0], [0.3, 0.4, 0.3])
FALLING = ([1.0, 1.1, 4.0], [0.45, 0.1, 0.45])  # few of the middle type, whose work would raise all others' rents


def slack(menu, theta):
    """The least by which a constraint holds: each type's own offer against nothing and against every other one."""
    gains = menu.reward_usd[None] - menu.work[None] / np.asarray(theta)[:, None]  # [type, offer]
    own = np.diag(gains)
    return min(own.min(), (own[:, None] - gains).min())


def by_solver(theta, shares):
    """(server's utility, work) under all constraints."""
    theta, shares, n = np.asarray(theta), np.asarray(shares), len(theta)

    def loss(x):
        work, reward = np.maximum(x[:n], 1e-12), x[n:]
        return -np.sum(shares * (2 * np.sqrt(work) - reward))

    def constraints(x):
        gains = x[None, n:] - x[None, :n] / theta[:, None]
        own = np.diag(gains)
        return np.concatenate([own, (own[:, None] - gains)[~np.eye(n, dtype=bool)], x[:n]])

    best = min(
        (
            optimize.minimize(
                loss,
                np.concatenate([np.full(n, q), np.full(n, q / theta[0])]),
                constraints={"type": "ineq", "fun": constraints},
                method="SLSQP",
                options={"maxiter": 500, "ftol": 1e-13},
            )
            for q in (0.1, 1.0)
        ),
        key=lambda found: found.fun,
    )
    return -best.fun, best.x[:n]


def test_the_golden_menu():
    menu = screening_menu(*GOLDEN)
    np.testing.assert_allclose(menu.work, [0.213018, 2.115702, 16], atol=5e-7)
    np.testing.assert_allclose(menu.reward_usd, [0.213018, 1.164360, 4.635435], atol=5e-7)
    np.testing.assert_allclose(rents_usd(menu, GOLDEN[0]), [0, 0.106509, 0.635435], atol=5e-7)
    assert server_utility_usd(menu, GOLDEN[1]) == pytest.approx(1.920280, abs=5e-7)
    assert server_utility_usd(menu, GOLDEN[1]) < 2.3  # of full information
    assert choose(menu, [1.0, 0.5, 0.25, np.inf, 5.0]).tolist() == [0, 1, 2, -1, -1]


def test_menus_are_rational_compatible_and_the_best_that_a_solver_finds():
    rng, pooled = np.random.default_rng(0), 0
    for _ in range(12):
        n = int(rng.integers(1, 6))
        theta, shares = np.cumsum(rng.uniform(0.05, 1, n)), rng.dirichlet(np.ones(n)) * 0.9 + 0.1 / n
        menu = screening_menu(theta, shares)
        assert slack(menu, theta) >= -1e-9 and np.all(np.diff(menu.work) >= 0)
        found, _ = by_solver(theta, shares)
        assert server_utility_usd(menu, shares) == pytest.approx(found, rel=2e-5)
        pooled += bool(np.any(np.diff(menu.work) == 0))
    assert pooled >= 2


def test_types_that_would_fall_are_pooled_or_refused():
    menu = screening_menu(*FALLING)
    assert menu.work[0] == menu.work[1] < menu.work[2]
    assert server_utility_usd(menu, FALLING[1]) == pytest.approx(by_solver(*FALLING)[0], rel=1e-5)
    with pytest.raises(ValueError, match="falls from type 0 to the next"):
        screening_menu(*FALLING, iron=False)


def test_a_limit_and_a_budget_hold_and_are_used():
    theta, shares = GOLDEN
    for budget in (0.01, 0.3, 0.8):
        menu = screening_menu(theta, shares, most=1.0, budget_usd=budget)
        assert np.sum(shares * menu.reward_usd) == pytest.approx(budget) and menu.work.max() <= 1
        assert slack(menu, theta) >= -1e-12
    rich = screening_menu(theta, shares, most=1.0, budget_usd=50.0)
    np.testing.assert_allclose(rich.work, 1.0)
    np.testing.assert_allclose(rich.reward_usd, 1.0)  # the dearest type's cost, for everybody
    free = screening_menu(theta, shares, budget_usd=1.5)
    assert np.sum(shares * free.reward_usd) == pytest.approx(1.5)
    np.testing.assert_allclose(free.work / free.work[0], screening_menu(theta, shares).work / 0.21301775, rtol=1e-6)


def test_clients_between_two_types_take_the_dearer_ones_offer():
    menu = screening_menu(*GOLDEN)
    assert choose(menu, [0.99, 0.51, 0.26, 0.1]).tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    "call, expected",
    [
        (lambda: Menu(np.asarray([1.0, 0.5]), np.asarray([1.0, 2.0])), "work of a menu must be 0 or more and rise"),
        (lambda: Menu(np.asarray([1.0, 2.0]), np.asarray([2.0, 1.0])), "reward_usd of a menu must be .* offer 1 has 1"),
        (lambda: Menu(np.asarray([-1.0]), np.asarray([1.0])), "offer 0 has -1"),
        (lambda: screening_menu([2.0, 1.0], [0.5, 0.5]), "theta must rise"),
        (lambda: screening_menu([1.0, 2.0], [0.5, 0.6]), "shares must add up to 1"),
        (lambda: screening_menu([1.0, 2.0], [1.0, 0.0]), "shares must be above 0"),
        (lambda: screening_menu([1.0], [1.0], budget_usd=0.0), "budget_usd must be above 0"),
        (lambda: choose(screening_menu(*GOLDEN), [-1.0]), "cost_per_work_usd must be numbers of 0 or more"),
    ],
)
def test_bad_input_is_refused(call, expected):
    with pytest.raises(ValueError, match=expected):
        call()
