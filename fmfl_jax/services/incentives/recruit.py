"""Mechanisms by which a server takes on clients for a round of training, each as an offer to every client.

A client has a cost of a round's work (joules times a price), which is its own business. An offer is a chance of being
taken on in this round and what is paid if it is, such that telling the cost, or choosing by it, is the best a client
can do, and that nobody who is taken on gets less than it costs:

    auction       the proportional-share auction at a budget (procurement.py): in or out, paid the critical ask
    contract      a menu of (share of the rounds, reward) by types of cost (contracts.py); paid R / q for each round
    stackelberg   a reward shared by effort, the share of the rounds (stackelberg.py); R / T for each round
    posted        one price for whoever accepts it, drawn at random: random selection at the same budget

The auction and the posted price keep the budget in every round, the other two on average over rounds.

    >>> offers = auction_offers(costs_usd, values, budget_usd=2.0, most=10)
    >>> client_ids = np.flatnonzero(taken_on(offers, rng))
"""

from typing import NamedTuple

import numpy as np

from fmfl_jax.services.checks import at_least, positive
from fmfl_jax.services.incentives.contracts import choose, screening_menu
from fmfl_jax.services.incentives.procurement import buy
from fmfl_jax.services.incentives.stackelberg import best_reward, effort_equilibrium, log_value


class Offers(NamedTuple):
    """chance: float64 [n] of being taken on in a round. payment_usd: float64 [n], for a round, if it is."""

    chance: np.ndarray
    payment_usd: np.ndarray


def auction_offers(costs_usd, values, *, budget_usd: float, most: int) -> Offers:
    """costs_usd: [n] of a round, inf for who cannot take part. values: [n], what a client's work is worth to the
    server, in any unit. most: clients of a round."""
    bought = buy(_costs(costs_usd), values, budget_usd=budget_usd, most=most)
    return Offers(bought.winners.astype(np.float64), bought.payments_usd)


def contract_offers(
    costs_usd, *, most: int, budget_usd: float | None = None, value: float = 1.0, num_types: int = 5
) -> Offers:
    """A menu for num_types types of equally many clients, each type as dear as its dearest client, so that all of a
    type accept; a client then chooses by its own cost.

    budget_usd: of a round, on average. None: the server's value of work q, the share of rounds, is 2 a sqrt(q), with a
    `value` times the clients' mean cost.
    """
    costs = _costs(costs_usd)
    at_least(1, num_types=num_types, most=most)
    able = np.sort(costs[np.isfinite(costs)])[::-1]
    if not len(able):
        return Offers(np.zeros(len(costs)), np.zeros(len(costs)))
    starts = np.unique(np.linspace(0, len(able), num_types, endpoint=False).astype(int))
    dearest = able[starts]
    sizes = np.diff(np.append(starts, len(able)))
    distinct, type_of = np.unique(-dearest, return_inverse=True)  # from the dearest on: efficiency rises
    shares = np.bincount(type_of, weights=sizes) / len(able)
    menu = screening_menu(
        -1 / distinct,
        shares,
        value_usd=value * float(able.mean()),
        most=min(1.0, most / len(able)),
        budget_usd=None if budget_usd is None else budget_usd / len(able),
    )
    taken = choose(menu, costs)
    work = np.where(taken >= 0, menu.work[taken], 0.0)
    reward = np.where(taken >= 0, menu.reward_usd[taken], 0.0)
    return Offers(work, np.divide(reward, work, out=np.zeros(len(costs)), where=work > 0))


def stackelberg_offers(costs_usd, *, most: int, budget_usd: float | None = None, value: float = 10.0) -> Offers:
    """Shares of the rounds as efforts in equilibrium.

    budget_usd: the reward of a round, on average. None: the reward that maximizes a ln(1 + sum ln(1 + t_i)) - R, with a
    `value` times the clients' mean cost. Where fewer than two clients can take part nobody is taken on: a single one
    would work as little as it likes.
    """
    costs = _costs(costs_usd)
    at_least(1, most=most)
    able = costs[np.isfinite(costs)]
    if len(able) < 2:
        return Offers(np.zeros(len(costs)), np.zeros(len(costs)))
    share = min(1.0, most / len(able))
    if budget_usd is None:
        effort = best_reward(log_value(value * float(able.mean())), costs, most=share).answer
    else:
        effort = effort_equilibrium(budget_usd, costs, most=share)
    return Offers(effort.effort, np.where(effort.effort > 0, effort.unit_usd, 0.0))


def posted_offers(costs_usd, *, budget_usd: float, most: int) -> Offers:
    """The same price for everybody, budget / m, and of those who accept m at random, with the m of at most `most` that
    takes on the most clients: the server knows how costs are distributed, not who has which."""
    positive(budget_usd=budget_usd, most=most)
    costs, places = _costs(costs_usd), np.arange(1, most + 1)
    accepting = np.searchsorted(np.sort(costs), budget_usd / places, side="right")
    best = int(np.argmax(np.minimum(places, accepting)))  # of equals the highest price
    accepts = costs <= budget_usd / places[best]
    chance = min(1.0, places[best] / max(int(accepts.sum()), 1))
    return Offers(np.where(accepts, chance, 0.0), np.where(accepts, budget_usd / places[best], 0.0))


def taken_on(offers: Offers, rng: np.random.Generator) -> np.ndarray:
    """Who is taken on: bool [n], each with its chance, and always as many as the chances add up to, but for one
    (systematic sampling in a random order, Madow 1949)."""
    chosen = offers.chance >= 1
    order = rng.permutation(np.flatnonzero(~chosen))
    steps = np.cumsum(offers.chance[order]) + (1 - 1e-9) * rng.random()  # just below 1: never one more for rounding
    passed = np.diff(np.floor(steps), prepend=0.0) >= 1
    chosen[order[passed]] = True
    return chosen


def _costs(costs_usd) -> np.ndarray:
    costs = np.asarray(costs_usd, np.float64)
    if costs.ndim != 1 or not np.all(costs > 0):
        raise ValueError("costs_usd must be positive numbers, one for each client")
    return costs
