"""Federated rounds over a wireless network: who is heard in a round, with which weights, and what it costs.

The network (fmfl_jax/wireless) and the algorithm (fmfl_jax/fed) know nothing of each other; here the delivered mask
becomes weights and the times and energies become a record. Everything follows from (seed, round, cohort): after a stop
the network is played again from round 0 and not kept in checkpoints.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.wireless import arrival, presets
from fmfl_jax.wireless.network import Network, NetworkState, init_network
from fmfl_jax.wireless.simulate import RoundOutcome, base_delivery_s, simulate_round

_AIR = 0x616972  # first word of the network's keys, so that they are none of the learning side's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Air:
    """A network and what a federated job asks of it; C is network.num_clients.

    compute_s, compute_j: float32 [C], a client's local work of a round, s and J. able: bool [C], whose device can hold
    the job; the others are never selected. uplink_bits, downlink_bits: of one client's update and of what each receives.
    base_bits: the base model, brought to every able client once before the first round; 0 if they hold it already.
    unbiased: inverse-probability weights in place of the mean over the survivors. rings: place the clients by
    `presets.rings_20` and not at random.
    """

    network: Network
    compute_s: np.ndarray
    compute_j: np.ndarray
    able: np.ndarray
    uplink_bits: int
    downlink_bits: int
    base_bits: int = 0
    unbiased: bool = False
    rings: bool = False

    def __post_init__(self):
        for name in ("compute_s", "compute_j", "able"):
            shape = np.shape(getattr(self, name))
            if shape != (self.network.num_clients,):
                raise ValueError(f"{name} must have shape [{self.network.num_clients}], one per client, got {shape}")


class AirState(NamedTuple):
    """network: positions, fading fields, clock. Since the start, base delivery included: seconds, joules of all clients,
    bytes sent uplink. base_delivery_s: until the last able client in reach had the base; base_unreached: able clients
    out of reach then (they are taken to get it later, uncounted)."""

    network: NetworkState
    seconds: float
    joules: float
    uplink_bytes: float
    base_delivery_s: float
    base_unreached: int


@functools.partial(jax.jit, static_argnums=0)
def _simulate(network, state, key, uplink_bits, downlink_bits, compute_s, compute_j, selected, weight):
    return simulate_round(network, state, key, uplink_bits, downlink_bits, compute_s, compute_j, selected=selected,
                          weight=weight)


def start(air: Air, seed: int) -> AirState:
    """The network of `seed` after the base model was delivered."""
    place = presets.rings_20 if air.rings else init_network
    state = place(air.network, jax.random.fold_in(jax.random.key(seed), _AIR))
    if not air.base_bits:
        return AirState(state, 0.0, 0.0, 0.0, 0.0, 0)
    times = np.asarray(base_delivery_s(air.network, state, float(air.base_bits), jnp.asarray(air.able)))
    reached = np.isfinite(times)
    delivery = float(np.max(times, initial=0.0, where=reached))
    return AirState(state, delivery, 0.0, 0.0, delivery, int(np.sum(~reached)))


def play_round(air: Air, state: AirState, *, round: int, seed: int, client_ids: np.ndarray,
               num_examples: np.ndarray) -> tuple[AirState, RoundOutcome]:
    """The network's part of a round, [C] over all clients, as numpy arrays.

    client_ids: int [K], the cohort; of it the clients whose device can hold the job are selected. num_examples:
    float32 [K], what the schedulers that weigh clients weigh them by.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _AIR + 1), round)
    selected, weight = np.zeros(air.network.num_clients, bool), np.zeros(air.network.num_clients, np.float32)
    selected[client_ids], weight[client_ids] = air.able[client_ids], num_examples
    payload = np.full(air.network.num_clients, air.uplink_bits, np.float32)
    network, outcome = _simulate(air.network, state.network, key, payload, np.float32(air.downlink_bits),
                                 np.float32(air.compute_s), np.float32(air.compute_j), selected, weight)
    outcome = jax.device_get(outcome)
    state = state._replace(network=network, seconds=state.seconds + float(outcome.latency_s),
                           joules=state.joules + float(np.sum(outcome.energy_j, dtype=np.float64)),
                           uplink_bytes=state.uplink_bytes + sent_bytes(outcome))
    return state, outcome


def cohort_weights(air: Air, outcome: RoundOutcome, client_ids: np.ndarray, num_examples: np.ndarray):
    """(weights float32 [K], normalizers float32 [K] or None) for fed.algorithm.Cohort.

    The mean over the survivors is biased towards clients with good links; inverse-probability weights are not, over the
    clients that can hold the job and have any chance at all. If everybody arrives for certain, both are num_examples.
    """
    delivered, able = outcome.delivered[client_ids], air.able[client_ids]
    if not air.unbiased:
        return np.asarray(arrival.survivors_mean(jnp.asarray(num_examples), jnp.asarray(delivered)).weights), None
    weights = arrival.inverse_probability(jnp.asarray(num_examples), jnp.asarray(delivered),
                                          jnp.asarray(outcome.delivery_probability[client_ids]), jnp.asarray(able))
    return np.asarray(weights.weights), np.where(able, num_examples, np.float32(0))


def sent_bytes(outcome: RoundOutcome) -> float:
    """Payload of everybody who began to send, whether it arrived or not."""
    return float(np.sum(outcome.uplink_bits[outcome.uplink_s > 0], dtype=np.float64)) / 8


def record(air: Air, state: AirState, outcome: RoundOutcome, client_ids: np.ndarray) -> dict:
    """The round's figures for metrics.jsonl. participation + outage + cannot_hold = 1, shares of the cohort: heard; not
    heard though able (not scheduled, out of reach, late or lost); unable to hold the job."""
    size, able = len(client_ids), air.able[client_ids]
    delivered = outcome.delivered[client_ids]
    heard = int(delivered.sum())
    return {
        "latency_s": float(outcome.latency_s),
        "energy_j": float(np.sum(outcome.energy_j, dtype=np.float64)),
        "participation": heard / size,
        "outage": int(np.sum(able & ~delivered)) / size,
        "cannot_hold": int(np.sum(~able)) / size,
        "delivered": heard,
        "scheduled": int(outcome.scheduled.sum()),
        "uplink_bytes": sent_bytes(outcome),
        "downlink_bytes": int(able.sum()) * air.downlink_bits / 8,
    } | totals(state)


def totals(state: AirState) -> dict:
    """What was spent since the start."""
    return {"seconds": state.seconds, "joules": state.joules, "total_uplink_bytes": state.uplink_bytes}


def start_record(state: AirState) -> dict:
    """The figures of round 0: the delivery of the base model."""
    return {"base_delivery_s": state.base_delivery_s, "base_unreached": state.base_unreached} | totals(state)


def timeline(air: Air, outcome: RoundOutcome) -> dict:
    """Who waited for whom, as plain lists over the clients that took part, the slowest first: seconds of each phase."""
    ids = np.flatnonzero(outcome.scheduled)
    ids = ids[np.argsort(-outcome.finish_s[ids], kind="stable")]
    phases = {name: getattr(outcome, f"{name}_s")[ids].tolist() for name in ("downlink", "compute", "wait", "uplink")}
    deadline = float(air.network.deadline_s)
    return {"client_ids": ids.tolist(), "delivered": outcome.delivered[ids].tolist(), **phases,
            "latency_s": float(outcome.latency_s), "deadline_s": deadline if np.isfinite(deadline) else None}
