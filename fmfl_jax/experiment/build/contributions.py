"""What each client contributed to the model: measured after every round from the updates it sent, and summed up.

A coalition's model is the server's before the round moved by the weighted mean of the coalition's updates, and its
worth is minus its loss on the held-out data, in nats. Nothing is trained again.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax

from fmfl_jax import streams
from fmfl_jax.experiment.loop.participation import Record
from fmfl_jax.experiment.loop.rounds import Callback, RoundView
from fmfl_jax.experiment.methods.contributions import ComFedSV, ContributionMethod, Gtg
from fmfl_jax.fed.core.types import Aggregator, GatheredUpdates, Params, Tree
from fmfl_jax.parallel import local_copy, replicate
from fmfl_jax.services.incentives.comfedsv import Columns, completed_shapley, draw_columns
from fmfl_jax.services.incentives.gtg import gtg_shapley
from fmfl_jax.services.incentives.shapley import Game, leave_one_out

Loss = Callable[[Params, Tree], float]
"""(params, frozen), both replicated -> nats on the held-out data."""
_MOST_NATS = 100.0  # the worth of a model that has diverged is finite all the same


class Sent(NamedTuple):
    """What the measure is made of. updates: leaves [C, ...]. weights: [C], 0 for the absent. params: the server's,
    before the round."""

    updates: Tree
    weights: Tree
    params: Tree


def with_exports(aggregator: Aggregator) -> Aggregator:
    """The same aggregator, which shows the host what the clients sent."""

    def exports(gathered: GatheredUpdates, state: Tree) -> Sent:
        del state
        return Sent(gathered.updates, gathered.weights, gathered.params)

    return dataclasses.replace(aggregator, exports=exports)


def measure(method: ContributionMethod, loss: Loss, *, num_clients: int, seed: int) -> Callback:
    """The callback after a round. It records "contribution", a number for each of the round's clients, 0 for those of
    whom nothing arrived; of ComFedSV the worths of the coalitions that were there, for `totals`."""
    columns = _columns(method, num_clients, seed) if isinstance(method, ComFedSV) else None

    def measured(view: RoundView) -> Record:
        participation, sent = view.participation, view.exports
        assert participation is not None  # it is called after rounds
        ids = participation.client_ids
        present = np.flatnonzero(sent.weights[: len(ids)] > 0)
        game = coalition_game(sent, present, lambda params: loss(replicate(params), view.frozen))
        round = int(local_copy(view.state.round))  # 1 after the first
        if columns is not None:
            return _worths(columns, game, ids[present], num_clients, everybody=round == 1)
        rng = streams.host_rng(streams.CONTRIBUTIONS, seed, round)
        values, evaluations = np.zeros(len(ids)), 0
        if len(present):
            if isinstance(method, Gtg):
                found = gtg_shapley(
                    game,
                    len(present),
                    rng=rng,
                    round_tolerance=method.tolerance,
                    tolerance=method.tolerance,
                    convergence=method.convergence,
                )
                values[present], evaluations = found.values, found.evaluations
            else:
                values[present], evaluations = leave_one_out(game, len(present)), len(present) + 1
        return {"contribution": values.tolist(), "models_valued": evaluations}

    return measured


def coalition_game(sent: Sent, present: np.ndarray, loss: Callable[[Params], float]) -> Game:
    """v(coalition bool [P]) of the clients in the places `present` int [P]: minus the loss of the coalition's model."""
    weights = np.asarray(sent.weights, np.float64)[present]
    updates = jax.tree.map(lambda x: np.asarray(x)[present], sent.updates)

    def game(coalition: np.ndarray) -> float:
        params = sent.params
        if coalition.any():
            shares = np.where(coalition, weights, 0.0) / weights[coalition].sum()
            mean = jax.tree.map(lambda x: np.tensordot(shares.astype(x.dtype), x, axes=1), updates)
            params = optax.tree.sub(params, mean)
        nats = loss(params)
        return -min(nats, _MOST_NATS) if np.isfinite(nats) else -_MOST_NATS

    return game


def totals(method: ContributionMethod, history: list[Record], *, num_clients: int, seed: int) -> np.ndarray:
    """Each client's contribution to the whole run: float64 [num_clients], nats. Of GTG-Shapley and leave-one-out the
    sum over the rounds, of ComFedSV the values of the completed matrix."""
    rounds = history[1:]
    if isinstance(method, ComFedSV):
        columns = _columns(method, num_clients, seed)
        utilities = np.full((len(rounds), len(columns.coalitions)), np.nan)
        for row, record in zip(utilities, rounds):
            row[record["coalitions"]] = record["coalition_worths"]
        return completed_shapley(columns, utilities, rank=method.rank)
    total = np.zeros(num_clients)
    for record in rounds:
        np.add.at(total, record["clients"], record["contribution"])
    return total


def _columns(method: ComFedSV, num_clients: int, seed: int) -> Columns:
    rng = streams.host_rng(streams.CONTRIBUTIONS, seed, 0)
    return draw_columns(num_clients, num_permutations=method.permutations, rng=rng)


def _worths(columns: Columns, game: Game, there: np.ndarray, num_clients: int, *, everybody: bool) -> Record:
    """The worths of the coalitions that were there, above the empty one's. everybody: of all coalitions, those who were
    lost adding nothing to them: in the first round, so that every coalition is known once."""
    present = np.isin(np.arange(num_clients), there)
    known = np.arange(len(columns.coalitions)) if everybody else columns.within(present)
    worths, found = [], {}
    nothing = game(np.zeros(len(there), bool))
    for column in known:
        coalition = columns.coalitions[column][there]
        key = coalition.tobytes()
        if key not in found:
            found[key] = game(coalition) - nothing if coalition.any() else 0.0
        worths.append(found[key])
    return {"coalitions": known.tolist(), "coalition_worths": worths, "models_valued": 1 + len(found)}
