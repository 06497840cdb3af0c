"""Federated rounds over a wireless network: whose update is delivered, with which weights, and what it costs.

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

from fmfl_jax import streams
from fmfl_jax.experiment.config.network import AGGREGATIONS
from fmfl_jax.experiment.network.delivery import BaseDelivery, delivery_s
from fmfl_jax.wireless import arrival, presets
from fmfl_jax.wireless.network import Network, NetworkState, advance, channel, init_network, uplink_cn0_hz
from fmfl_jax.wireless.simulate import RoundOutcome, base_delivery_s, downlink_s, simulate_round

_REHEARSALS = 2  # cohorts that a client's expected energy is a mean over


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkJob:
    """A network and what a federated job asks of it; C is network.num_clients.

    compute_s, compute_j: float32 [C], a client's local work of a round, s and J. able: bool [C], whose device can hold
    the job; the others are never selected. uplink_bits: of a client's update, or int [C] where they differ;
    downlink_bits: of what each receives.
    base_bits: the base model, brought to every able client once before the first round, and to those that were out of
    reach then before the first round that draws them within reach; 0 if they hold it already.
    aggregation: "survivors", the mean over those delivered; "unbiased", inverse-probability weights; "last_delta",
    the last update that arrived stands in for a lost one; "over_the_air" and "over_the_air_truncated", all send at
    once, one value per symbol, with optimal power control or truncated inversion. rings: place the clients by
    `presets.rings_20` and not at random.
    """

    network: Network
    compute_s: np.ndarray
    compute_j: np.ndarray
    able: np.ndarray
    uplink_bits: int | np.ndarray = 0
    downlink_bits: int = 0
    base_bits: int = 0
    delivery: BaseDelivery | None = None
    aggregation: str = "survivors"
    rings: bool = False

    @property
    def analog(self) -> bool:
        """Whether the channel itself adds the messages up."""
        return self.aggregation.startswith("over_the_air")

    def __post_init__(self):
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {self.aggregation!r}")
        for name in ("compute_s", "compute_j", "able"):
            shape = np.shape(getattr(self, name))
            if shape != (self.network.num_clients,):
                raise ValueError(f"{name} must have shape [{self.network.num_clients}], one per client, got {shape}")


class JobState(NamedTuple):
    """network: positions, fading fields, clock. Since the start, base delivery included: seconds, joules of all
    clients, bytes sent uplink. holds_base: bool [C], who can take part. Of the last delivery of the base, before the
    first round or a later one: base_delivery_s, until the last client in reach had it, and base_reached, how many that
    were."""

    network: NetworkState
    seconds: float
    joules: float
    uplink_bytes: float
    holds_base: np.ndarray
    base_delivery_s: float
    base_reached: int


@functools.partial(jax.jit, static_argnums=0)
def _simulate(network, state, key, uplink_bits, downlink_bits, compute_s, compute_j, selected, weight):
    return simulate_round(
        network, state, key, uplink_bits, downlink_bits, compute_s, compute_j, selected=selected, weight=weight
    )


def start(job: NetworkJob, seed: int) -> JobState:
    """The network of `seed` after the base model was delivered."""
    place = presets.rings_20 if job.rings else init_network
    key = jax.random.key(seed)
    network, nobody = (
        place(job.network, jax.random.fold_in(key, streams.NETWORK_PLACES)),
        np.zeros(job.network.num_clients, bool),
    )
    return _deliver_base(
        job, JobState(network, 0.0, 0.0, 0.0, nobody, 0.0, 0), jax.random.fold_in(key, streams.NETWORK_BASE), job.able
    )


def _deliver_base(job: NetworkJob, state: JobState, key, chosen: np.ndarray) -> JobState:
    """Brings the base to those of `chosen`, bool [C], that do not hold it and are in reach; all move meanwhile."""
    chosen = chosen & ~state.holds_base
    if not np.any(chosen):
        return state._replace(base_delivery_s=0.0, base_reached=0)
    if job.delivery is None:
        times = np.asarray(base_delivery_s(job.network, state.network, float(job.base_bits), jnp.asarray(chosen)))
    else:
        times = delivery_s(job.network, state.network, job.delivery, chosen)
    reached = chosen & np.isfinite(times)
    delivery = float(np.max(times, initial=0.0, where=reached))
    network = advance(job.network, state.network, key, delivery)
    return state._replace(
        network=network,
        seconds=state.seconds + delivery,
        holds_base=state.holds_base | reached,
        base_delivery_s=delivery,
        base_reached=int(np.sum(reached)),
    )


def play_round(
    job: NetworkJob,
    state: JobState,
    *,
    round: int,
    seed: int,
    client_ids: np.ndarray,
    num_examples: np.ndarray,
    uplink_bits: int | np.ndarray | None = None,
) -> tuple[JobState, RoundOutcome]:
    """The network's part of a round, [C] over all clients, as numpy arrays.

    client_ids: int [K], the cohort; of it the clients whose device can hold the job and that hold the base, or can be
    brought it now, are selected. num_examples: float32 [K], what the schedulers that weigh clients weigh them by.
    uplink_bits: of each client's update in this round, where it is not the job's.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), streams.NETWORK_ROUND), round)
    selected, weight = np.zeros(job.network.num_clients, bool), np.zeros(job.network.num_clients, np.float32)
    selected[client_ids], weight[client_ids] = job.able[client_ids], num_examples
    state = _deliver_base(job, state, jax.random.fold_in(key, streams.NETWORK_PLACES), selected)
    selected &= state.holds_base
    network, outcome = _over_the_radio(job, state, key, selected, weight, uplink_bits)
    state = state._replace(
        network=network,
        seconds=state.seconds + float(outcome.latency_s),
        joules=state.joules + float(np.sum(outcome.energy_j, dtype=np.float64)),
        uplink_bytes=state.uplink_bytes + sent_bytes(outcome),
    )
    return state, outcome


def _over_the_radio(
    job: NetworkJob, state: JobState, key, selected: np.ndarray, weight: np.ndarray, uplink_bits
) -> tuple[NetworkState, RoundOutcome]:
    """The network after a round, and the round as numpy arrays. selected: bool [C]. weight: float32 [C]."""
    uplink_bits = job.uplink_bits if uplink_bits is None else uplink_bits
    bits = 0 if job.analog else uplink_bits
    payload = np.broadcast_to(np.float32(bits), (job.network.num_clients,))
    network, outcome = _simulate(
        job.network,
        state.network,
        key,
        payload,
        np.float32(job.downlink_bits),
        np.float32(job.compute_s),
        np.float32(job.compute_j),
        selected,
        weight,
    )
    outcome = jax.device_get(outcome)
    return network, _with_analog_uplink(job, outcome) if job.analog else outcome


def expected_j(
    job: NetworkJob,
    state: JobState,
    *,
    round: int,
    seed: int,
    cohort_size: int,
    num_examples: np.ndarray,
    uplink_bits: int | np.ndarray | None = None,
) -> np.ndarray:
    """What a round takes of each client's battery in a cohort drawn at random, float64 [C] J: compute and transmitter,
    by the scheduler, the rates and the fades of the network. inf: cannot hold the job, out of reach, never scheduled.

    The clients are dealt to cohorts a few times over, and each of these plays the round, of which nothing stays: how
    long a client sends depends on who shares the band, which no formula of its own link says.
    """
    count = job.network.num_clients
    able, total, played = np.flatnonzero(job.able), np.zeros(count), np.zeros(count)
    rng = streams.host_rng(streams.REHEARSALS, seed, round)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), streams.NETWORK_REHEARSAL), round)
    for deal in range(_REHEARSALS):
        order = rng.permutation(able)
        for first in range(0, len(order), cohort_size):
            ids = np.take(order, range(first, first + min(cohort_size, len(order))), mode="wrap")
            selected, weight = np.zeros(count, bool), np.zeros(count, np.float32)
            selected[ids], weight[ids] = True, num_examples[ids]
            of_cohort = jax.random.fold_in(key, deal * count + first)
            _, outcome = _over_the_radio(job, state, of_cohort, selected, weight, uplink_bits)
            total += np.where(outcome.scheduled, outcome.energy_j, 0.0)
            played += outcome.scheduled
    return np.where(played > 0, total / np.maximum(played, 1), np.inf)


def _with_analog_uplink(job: NetworkJob, outcome: RoundOutcome) -> RoundOutcome:
    """All who took part send together, once everybody is ready: one float32 value per symbol, so a time that does not
    grow with the number of clients. A weak channel adds noise to the sum, it loses no update."""
    seconds = np.float32(np.max(job.uplink_bits) / 32 / job.network.bandwidth_hz)
    joules = np.float32(seconds * 10 ** ((job.network.tx_power_dbm - 30) / 10))
    there, start = outcome.scheduled, outcome.latency_s
    add = lambda value: np.where(there, np.float32(value), np.float32(0))
    end = start + seconds
    return outcome._replace(
        latency_s=end,
        delivered=there,
        uplink_s=add(seconds),
        uplink_j=add(joules),
        energy_j=outcome.compute_j + add(joules),
        finish_s=add(end),
        wait_s=add(1) * (start - outcome.downlink_s - outcome.compute_s),
        uplink_bits=add(np.max(job.uplink_bits)),
    )


class CohortWeights(NamedTuple):
    """Of a Cohort: weights float32 [K], denominators float32 [K] or None, delivered bool [K]."""

    weights: np.ndarray
    denominators: np.ndarray | None
    delivered: np.ndarray


def cohort_weights(
    job: NetworkJob, outcome: RoundOutcome, client_ids: np.ndarray, num_examples: np.ndarray
) -> CohortWeights:
    """The weights of the clients whose update is delivered.

    The mean over the survivors is biased towards clients with good links; inverse-probability weights are not, over the
    clients that can hold the job and have any chance at all. If everybody arrives for certain, both are num_examples.
    With "last_delta" all clients that can hold the job count, delivered or not.
    """
    delivered, able = np.asarray(outcome.delivered)[client_ids], job.able[client_ids]
    members = np.where(able, num_examples, np.float32(0))
    if job.aggregation == "last_delta":
        return CohortWeights(members, members, delivered)
    if job.aggregation != "unbiased":
        return CohortWeights(arrival.survivors_mean(num_examples, delivered).weights, None, delivered)
    weights = arrival.inverse_probability(num_examples, delivered, outcome.delivery_probability[client_ids], able)
    return CohortWeights(weights.weights, members, delivered)


def analog_snr(job: NetworkJob, state: JobState, *, round: int, seed: int) -> np.ndarray:
    """Receive SNR of every client's symbols at full power, linear float32 [C]: the mean one times this round's Rayleigh
    fade for optimal power control, which knows it; without for truncated inversion, which draws one for each symbol."""
    mean = np.asarray(_cn0_hz(job.network, state.network)) / job.network.bandwidth_hz
    if job.aggregation == "over_the_air_truncated":
        return mean.astype(np.float32)
    fade = streams.host_rng(streams.ANALOG_FADE, seed, round).exponential(size=mean.shape)
    return (mean * fade).astype(np.float32)


def predicted_s(job: NetworkJob, state: JobState, sharers: int, uplink_bits=None) -> np.ndarray:
    """How long each client's round would take, float32 [C]: downlink, compute, and an upload without fading on an equal
    share of the band (all of it in turns). inf: cannot hold the job, or out of reach."""
    net = job.network
    down = np.asarray(downlink_s(net, state.network, float(job.downlink_bits), jnp.asarray(job.able)))
    band = net.bandwidth_hz / sharers
    rate = band * np.log2(1 + np.asarray(_cn0_hz(net, state.network), np.float64) / band)
    turns = sharers if net.access == "tdma" else 1
    if net.access == "tdma":
        rate = rate * sharers
    uplink_bits = job.uplink_bits if uplink_bits is None else uplink_bits
    up = turns * np.asarray(uplink_bits) / np.maximum(rate, 1e-9)
    return np.where(job.able, down + job.compute_s + up, np.inf).astype(np.float32)


def _cn0_hz(network: Network, state: NetworkState):
    return uplink_cn0_hz(network, channel(network, state).path_gain_db)[0]


def sent_bytes(outcome: RoundOutcome) -> float:
    """What of the payloads was sent before the round closed, whether the whole arrived or not."""
    return float(np.sum(outcome.uplink_bits, dtype=np.float64)) / 8


def record(job: NetworkJob, state: JobState, outcome: RoundOutcome, client_ids: np.ndarray) -> dict:
    """The round's figures for metrics.jsonl. participation + outage + cannot_hold = 1, shares of the cohort: delivered;
    not delivered though able (not scheduled, out of reach, late or lost); unable to hold the job."""
    size, able = max(len(client_ids), 1), job.able[client_ids]  # a rule may find nobody
    delivered = outcome.delivered[client_ids]
    num_delivered = int(delivered.sum())
    return {
        "latency_s": float(outcome.latency_s),
        "energy_j": float(np.sum(outcome.energy_j, dtype=np.float64)),
        "participation": num_delivered / size,
        "outage": int(np.sum(able & ~delivered)) / size,
        "cannot_hold": int(np.sum(~able)) / size,
        "delivered": num_delivered,
        "scheduled": int(outcome.scheduled.sum()),
        "uplink_bytes": sent_bytes(outcome),
        "downlink_bytes": int(np.sum(state.holds_base[client_ids])) * job.downlink_bits / 8,
    } | totals(job, state)


def totals(job: NetworkJob, state: JobState) -> dict:
    """The base's delivery before this round, or before the first, with the clients still without; and the time, energy
    and bytes since the start."""
    return {
        "base_delivery_s": state.base_delivery_s,
        "base_downlink_bytes": state.base_reached * job.base_bits / 8,
        "base_unreached": int(np.sum(job.able & ~state.holds_base)),
        "seconds": state.seconds,
        "joules": state.joules,
        "total_uplink_bytes": state.uplink_bytes,
    }


def timeline(job: NetworkJob, outcome: RoundOutcome) -> dict:
    """Who waited for whom, as plain lists over the clients that took part, the slowest first: seconds of each phase."""
    ids = np.flatnonzero(outcome.scheduled)
    ids = ids[np.argsort(-outcome.finish_s[ids], kind="stable")]
    phases = {name: getattr(outcome, f"{name}_s")[ids].tolist() for name in ("downlink", "compute", "wait", "uplink")}
    deadline = float(job.network.deadline_s)
    return {
        "client_ids": ids.tolist(),
        "delivered": outcome.delivered[ids].tolist(),
        **phases,
        "latency_s": float(outcome.latency_s),
        "deadline_s": deadline if np.isfinite(deadline) else None,
    }
