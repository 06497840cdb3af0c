"""Who takes part in a round: uniform, Poisson, deadline-aware, and by importance, Oort (Lai et al., OSDI 2021).

    Oort: utility_i = |B_i| sqrt(mean of B_i's squared losses) (T / t_i)^(alpha [t_i > T]) + sqrt(0.1 log R / L_i)

All on the host, in numpy: a cohort follows from the selector's state, (seed, round) and what the network predicts, so
it is the same on any number of devices. A state is a dict of numpy arrays over all clients, to be checkpointed.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from fmfl_jax import streams
from fmfl_jax.data.batches import cohort, poisson_cohort
from fmfl_jax.fed.shares import nearest_count, positive_count

# Oort's constants, as published and released.
_EXPLORE_START, _EXPLORE_DECAY, _EXPLORE_LEAST = 0.9, 0.98, 0.2
_STALENESS, _CUT_OFF, _CLIP_QUANTILE, _PACER_WINDOW, _PACER_STEP = 0.1, 0.95, 0.95, 20, 0.05


SelectorState = Mapping[str, np.ndarray]
Observe = Callable[[SelectorState, np.ndarray, np.ndarray, np.ndarray], SelectorState]
"""See `Selector`."""


class Select(Protocol):
    """See `Selector`."""

    def __call__(
        self, state: SelectorState, *, round: int, seed: int, predicted_s: np.ndarray | None = None
    ) -> np.ndarray: ...


class Capacity(Protocol):
    """See `Selector`."""

    def __call__(self, num_clients: int, /, *, num_rounds: int, seed: int) -> int: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selector:
    """init(num_clients) -> state, {name: numpy array}.

    select(state, *, round, seed, predicted_s=None) -> int64 [K], sorted, without repetition; K may be 0 where a rule
      finds nobody. predicted_s: float32 [num_clients], how long each client's round would take, inf out of reach.
    observe(state, client_ids [K], losses [K], seconds [K]) -> state, after every round: of those delivered, their
      losses and how long they took (0: not known). K may be 0.
    capacity(num_clients, *, num_rounds, seed) -> the most that any of the rounds selects.
    needs_prediction: select must be given predicted_s. learns: observe must be given every round before the next.
    """

    init: Callable[[int], SelectorState]
    select: Select
    observe: Observe
    capacity: Capacity
    needs_prediction: bool = False
    learns: bool = False


def uniform(cohort_size: int) -> Selector:
    """cohort_size clients without replacement."""

    def select(state, *, round, seed, predicted_s=None):
        return cohort(int(state["num_clients"]), cohort_size, round=round, seed=seed)

    return _stateless(select, cohort_size)


def poisson(rate: float) -> Selector:
    """Each client with probability `rate`, independently of the others: what the accounting of privacy assumes."""

    def draw(num_clients, round, seed):
        return poisson_cohort(num_clients, rate, round=round, seed=seed)

    def select(state, *, round, seed, predicted_s=None):
        return draw(int(state["num_clients"]), round, seed)

    def capacity(num_clients, *, num_rounds, seed):
        return max([1] + [len(draw(num_clients, round, seed)) for round in range(num_rounds)])

    return dataclasses.replace(_stateless(select, 1), capacity=capacity)


def deadline_aware(cohort_size: int, deadline_s: float) -> Selector:
    """Up to cohort_size clients, uniformly among those predicted to be done by the deadline; the rest is not asked."""
    if not deadline_s > 0:
        raise ValueError(f"deadline_s must be above 0, got {deadline_s}")

    def select(state, *, round, seed, predicted_s=None):
        if predicted_s is None:
            raise ValueError("selection by deadline needs a prediction of each client's round")
        able = np.flatnonzero(np.asarray(predicted_s) <= deadline_s)
        rng = streams.host_rng(streams.DEADLINE_COHORT, seed, round)
        return np.sort(rng.choice(able, min(cohort_size, len(able)), replace=False))

    return dataclasses.replace(_stateless(select, cohort_size), needs_prediction=True)


def oort(cohort_size: int, num_examples: np.ndarray, *, alpha: float = 2.0) -> Selector:
    """Oort's Algorithm 1: most of a cohort by utility, the rest, a share that falls from 0.9 to 0.2, among the unseen.

    num_examples: [num_clients], |B_i|. alpha: the penalty's exponent for clients slower than T. A client's loss is
    taken for the root mean square of its examples' losses; a mean, where that is what clients report, is a little less.
    Utilities are cut off at their 95th percentile and divided by it before the bonus for not having been seen since L_i
    is added, as in the released code; R counts rounds. Among the clients within 95 % of the last admitted one's utility
    the draw is random, in proportion to utility. T is a quantile of the times seen so far: it starts at 0.3 and goes up
    by 0.05 whenever the utility that 20 rounds collected is less than that of the 20 before (the pacer). Unseen clients
    are drawn by 1 / predicted_s where it is given, else uniformly. The released code's black list is left out. How many
    are explored is the nearest whole number (fed/shares.py), where the released code rounds the others down.

    Raises ValueError for a cohort of more than all clients, and for one so small that nobody would be explored.
    """
    num_examples = np.asarray(num_examples, np.float64)
    if not 1 <= cohort_size <= len(num_examples):
        raise ValueError(f"cohort_size is {cohort_size}: expected 1 to {len(num_examples)}, the number of clients")
    positive_count(_EXPLORE_LEAST, cohort_size, "Oort's exploration")

    def init(num_clients):
        if num_clients != len(num_examples):
            raise ValueError(f"{num_clients} clients, but num_examples has {len(num_examples)}")
        return {
            "utility": np.zeros(num_clients),
            "seconds": np.zeros(num_clients),
            "last_round": np.zeros(num_clients, np.int64),
            "rounds": np.zeros((), np.int64),
            "quantile": np.asarray(0.3),
            "collected": np.zeros(2 * _PACER_WINDOW),
        }

    def select(state, *, round, seed, predicted_s=None):
        rng = streams.host_rng(streams.OORT_COHORT, seed, round)
        seen = np.flatnonzero(np.asarray(state["last_round"]) > 0)
        unseen = np.flatnonzero(np.asarray(state["last_round"]) == 0)
        explore = max(_EXPLORE_LEAST, _EXPLORE_START * _EXPLORE_DECAY**round)
        known = min(len(seen), max(cohort_size - nearest_count(explore, cohort_size), cohort_size - len(unseen)))
        chosen = []
        if known:
            utility = _utilities(state, alpha)[seen]
            least = np.sort(utility)[len(seen) - known]
            admitted = utility >= _CUT_OFF * least
            chosen.append(seen[admitted][_draw(rng, utility[admitted], known)])
        if known < cohort_size:
            speed = (
                np.ones(len(unseen)) if predicted_s is None else 1 / np.maximum(np.asarray(predicted_s)[unseen], 1e-9)
            )
            chosen.append(unseen[_draw(rng, speed, cohort_size - known)])
        return np.sort(np.concatenate(chosen))

    return Selector(
        init=init,
        select=select,
        observe=functools.partial(_observe, num_examples),
        capacity=lambda n, *, num_rounds, seed: cohort_size,
        learns=True,
    )


def _observe(num_examples: np.ndarray, state: SelectorState, client_ids, losses, seconds) -> SelectorState:
    """Oort's state after a round, and its pacer."""
    new = {name: np.array(value) for name, value in state.items()}  # copies
    new["rounds"] += 1
    ids = np.asarray(client_ids, np.int64)
    losses = np.nan_to_num(np.asarray(losses, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    new["utility"][ids] = num_examples[ids] * np.maximum(losses, 0)
    new["seconds"][ids] = seconds
    new["last_round"][ids] = new["rounds"]
    new["collected"] = np.append(new["collected"][1:], new["utility"][ids].sum())
    if new["rounds"] >= 2 * _PACER_WINDOW and new["rounds"] % _PACER_WINDOW == 0:
        before, since = new["collected"].reshape(2, _PACER_WINDOW).sum(axis=1)
        if before > since:
            new["quantile"] = np.asarray(min(1.0, new["quantile"] + _PACER_STEP))
    return new


def _utilities(state: SelectorState, alpha: float) -> np.ndarray:
    """[num_clients] of those who were seen; of the others meaningless."""
    utility, seconds, last = (np.asarray(state[name]) for name in ("utility", "seconds", "last_round"))
    seen = last > 0
    most = np.quantile(utility[seen], _CLIP_QUANTILE)
    value = np.minimum(utility, most) / (most if most > 0 else 1.0)
    value = value + np.sqrt(_STALENESS * np.log(state["rounds"] + 1) / np.maximum(last, 1))
    preferred = np.quantile(seconds[seen], state["quantile"])
    late = seconds > preferred
    return value * np.where(late, preferred / np.where(late, seconds, 1.0), 1.0) ** alpha


def _draw(rng, weights, count: int) -> np.ndarray:
    """`count` places of `weights`, without replacement, one after another in proportion to them (Gumbel's trick)."""
    return np.argsort(-(np.log(np.maximum(weights, 1e-30)) + rng.gumbel(size=len(weights))), kind="stable")[:count]


def _stateless(select: Select, cohort_size: int) -> Selector:
    return Selector(
        init=lambda num_clients: {"num_clients": np.asarray(num_clients, np.int64)},
        select=select,
        observe=lambda state, client_ids, losses, seconds: state,
        capacity=lambda num_clients, *, num_rounds, seed: cohort_size,
    )
