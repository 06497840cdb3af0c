"""Rounds whose clients are taken on and paid: what they ask, who is drawn, what they keep."""

import dataclasses
from typing import NamedTuple

import numpy as np

from fmfl_jax import streams
from fmfl_jax.experiment.methods.incentives import MakeOffers
from fmfl_jax.finite import finite_fields
from fmfl_jax.services.incentives.recruit import taken_on
from fmfl_jax.wireless.simulate import RoundOutcome

J_PER_KWH = 3.6e6
_TOTALS = ("paid_usd", "cost_usd", "client_surplus_usd")


class Recruits(NamedTuple):
    """client_ids: int64 [K], sorted; K may be 0. payments_usd: float64 [K], for those that do the round's work."""

    client_ids: np.ndarray
    payments_usd: np.ndarray


def payment_columns(rounds: list[dict]) -> dict:
    """What the records of all rounds come to: clients taken on in a round on average, USD in all; nothing without a
    market."""
    paid = [record for record in rounds if "paid_usd" in record]
    if not paid:
        return {}
    totals = {f"total_{name}": sum(record[name] for record in paid) for name in _TOTALS}
    return {"recruited_per_round": sum(record["recruited"] for record in paid) / len(paid)} | totals


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class Market:
    """offers: the mechanism. usd_per_j: what a joule costs a client. name: of the mechanism, for messages."""

    offers: MakeOffers
    usd_per_j: float
    name: str

    def opening(self, energy_j: np.ndarray) -> dict:
        """Figures of what clients ask before the first round. energy_j: [num_clients], what a round is expected to
        take of each, inf for who cannot take part.

        Raises ValueError where nobody can take part, and where the mechanism takes on nobody.
        """
        asks = self._asks(energy_j)
        able = asks[np.isfinite(asks)]
        if not len(able):
            raise ValueError(f"incentive={self.name}: no client is in reach with a device that can hold the job")
        if not self.offers(asks).chance.any():
            raise ValueError(
                f"incentive={self.name} takes on nobody: {len(able)} clients ask {able.min():.3g} to {able.max():.3g} "
                "USD for a round"
            )
        return {"least_ask_usd": float(able.min()), "most_ask_usd": float(able.max())}

    def recruit(self, energy_j: np.ndarray, *, round: int, seed: int) -> Recruits:
        """The clients of a round."""
        asks = self._asks(energy_j)
        if not np.isfinite(asks).any():
            return Recruits(np.zeros(0, np.int64), np.zeros(0))
        offers = self.offers(asks)
        ids = np.flatnonzero(taken_on(offers, streams.host_rng(streams.RECRUITS, seed, round)))
        return Recruits(ids, offers.payment_usd[ids])

    def figures(self, recruits: Recruits, outcome: RoundOutcome) -> dict:
        """For the round's record: a payment for each of its clients (0 for who was not scheduled, and spent nothing),
        the joules' worth of those who worked, what they keep, together and the least of them."""
        ids, worked = recruits.client_ids, np.asarray(outcome.scheduled)[recruits.client_ids]
        payments = np.where(worked, recruits.payments_usd, 0.0)
        costs = self.usd_per_j * np.asarray(outcome.energy_j, np.float64)[ids]
        return {
            "recruited": len(ids),
            "payments_usd": payments.tolist(),
            "paid_usd": float(payments.sum()),
            "cost_usd": float(costs.sum()),
            "client_surplus_usd": float((payments - costs).sum()),
            "least_surplus_usd": float((payments - costs)[worked].min()) if worked.any() else 0.0,
        }

    def _asks(self, energy_j: np.ndarray) -> np.ndarray:
        return self.usd_per_j * np.asarray(energy_j, np.float64)
