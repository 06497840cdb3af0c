"""What the requests of a run cost, and who serves them: placement (Fig. 3), outages in rounds, the cache.

The federation's server stands at the edge. Between it and the cloud is a backhaul, between it and the clients a radio
link; the nodes are those of the worked example in services/placement.py's source: 400 TFLOP/s at the cloud, 60 at the
edge, 4 at a client. Prices are this project's choice, in US dollars: 4 an hour for the cloud's accelerator, 0.6 for the
edge's, none for the client's own, 0.05 a gigabyte over the backhaul.

A batch of n equal requests costs n payloads, one round trip, and the compute of the batch. Who asks a first choice that
cannot be reached waits for timeout_s before it turns to the cache, the fallback or nothing, and idles meanwhile, a
server at 50 W and a client at 1 W (this project's choice): an answer that never comes has a price too.
"""

from typing import NamedTuple

import numpy as np

from fmfl_jax import streams
from fmfl_jax.experiment.services.config import PlacementConfig
from fmfl_jax.services.outage import outage_trace
from fmfl_jax.services.placement import (
    Cost,
    Limits,
    Link,
    ModelSize,
    Node,
    Option,
    RequestSize,
    choose,
    fits,
    request_cost,
)

NODES = {
    "cloud": Node(
        name="cloud",
        compute_flops=400e12,
        memory_bandwidth_bytes_s=3.35e12,
        memory_bytes=80e9,
        price_per_s=4 / 3600,
        active_power_w=700.0,
    ),
    "edge": Node(
        name="edge",
        compute_flops=60e12,
        memory_bandwidth_bytes_s=0.3e12,
        memory_bytes=24e9,
        price_per_s=0.6 / 3600,
        active_power_w=150.0,
    ),
    "client": Node(
        name="client", compute_flops=4e12, memory_bandwidth_bytes_s=60e9, memory_bytes=8e9, active_power_w=8.0
    ),
}
IDLE_W = {"server": 50.0, "client": 1.0}  # of who waits
RADIO = Link(rate_bps=20e6, rtt_s=0.010, energy_j_per_bit=1e-7)
BACKHAUL = Link(rate_bps=1e9, rtt_s=0.050, price_per_bit=0.05 / 8e9, energy_j_per_bit=1e-8)


class Request(NamedTuple):
    """num_texts equal requests, sent together. size: of each."""

    num_texts: int
    size: RequestSize


class FmRound(NamedTuple):
    """What a round's requests came to. served: one of placement.SERVED, "" where nothing was asked. seconds until the
    answer, waited_s of them for one that did not come; joules of node, link and waiting; bytes_up, bytes_down; price in
    dollars; texts that the FM computed; placement: whose answer it is, None where no node computed. absent_classes:
    asked for by clients that have no row of them."""

    served: str = ""
    seconds: float = 0.0
    joules: float = 0.0
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    price: float = 0.0
    texts: int = 0
    placement: str | None = None
    absent_classes: int = 0
    waited_s: float = 0.0

    def figures(self) -> dict:
        """For the round's record."""
        if not self.served:
            return {}
        named = self._asdict() | {"bytes": self.bytes_up + self.bytes_down}
        return {f"fm_{name}": value for name, value in named.items() if name not in ("bytes_up", "bytes_down")}


def path(asker: str, placement: str) -> Link | None:
    """From who asks ("server" or "client") to where the FM is; None: it is there. The client's FM is its own, or, where
    the server asks, any client's."""
    if (asker, placement) in (("server", "edge"), ("client", "client")):
        return None
    if (asker, placement) == ("client", "cloud"):
        return Link(
            rate_bps=min(RADIO.rate_bps, BACKHAUL.rate_bps),
            rtt_s=RADIO.rtt_s + BACKHAUL.rtt_s,
            price_per_bit=RADIO.price_per_bit + BACKHAUL.price_per_bit,
            energy_j_per_bit=RADIO.energy_j_per_bit + BACKHAUL.energy_j_per_bit,
        )
    return BACKHAUL if placement == "cloud" else RADIO


def batch_cost(node: Node, link: Link | None, model: ModelSize, request: Request) -> Cost:
    """Of all of a request's texts together."""
    n, size = request
    one = request_cost(node, link, model, size, batch=n)
    more_s = 0.0 if link is None else (n - 1) * (size.up_bits + size.down_bits) / link.rate_bps
    return one._replace(
        latency_s=one.latency_s + more_s,
        transfer_s=one.transfer_s + more_s,
        price=n * one.price,
        energy_j=n * one.energy_j,
    )


def way_up(config: PlacementConfig, num_steps: int, seed: int) -> np.ndarray:
    """bool [num_steps]: whether the first choice can be reached in each round."""
    if config.only_first_round:
        return np.arange(num_steps) == 0
    if config.mean_down_rounds == 0:
        return np.ones(num_steps, bool)
    return outage_trace(
        num_steps,
        step_s=1.0,
        mean_up_s=config.mean_up_rounds,
        mean_down_s=config.mean_down_rounds,
        rng=streams.host_rng(streams.SERVICE_OUTAGES, seed),
    )


def ask(config: PlacementConfig, model: ModelSize, request: Request, *, asker: str, up: bool, cached: bool) -> FmRound:
    """One request through placement: the first choice live, the cache, the fallback, or nobody. A cached answer itself
    costs nothing; the attempt before it, where the first choice is down, costs its timeout."""
    if cached and not config.ask_every_round:
        return FmRound("cached")
    waited_s = 0.0 if up else config.timeout_s
    waiting = FmRound(seconds=waited_s, joules=IDLE_W[asker] * waited_s, waited_s=waited_s)
    names = [config.placement] + ([] if config.fallback is None else [config.fallback])
    options = [
        Option(
            name,
            batch_cost(NODES[name], path(asker, name), model, request),
            up=up or name != config.placement,
            fits=fits(NODES[name], model, request.size),
        )
        for name in names
    ]
    decision = choose(options, Limits(), preferred=config.placement, cached=cached)
    if decision.placement is None:
        return waiting._replace(served=decision.served)
    cost = next(option.cost for option in options if option.name == decision.placement)
    local = path(asker, decision.placement) is None
    up_bits, down_bits = (0.0, 0.0) if local else (request.size.up_bits, request.size.down_bits)
    n = request.num_texts
    return waiting._replace(
        served=decision.served,
        seconds=waited_s + cost.latency_s,
        joules=waiting.joules + cost.energy_j,
        bytes_up=n * up_bits / 8,
        bytes_down=n * down_bits / 8,
        price=cost.price,
        texts=n,
        placement=decision.placement,
    )


def with_broadcast(asked: FmRound, bits: float, num_clients: int) -> FmRound:
    """A round's requests and, after them, what the server sends to all clients at once, each of which receives it."""
    return asked._replace(
        seconds=asked.seconds + bits / RADIO.rate_bps + RADIO.rtt_s,
        joules=asked.joules + num_clients * bits * RADIO.energy_j_per_bit,
        bytes_down=asked.bytes_down + num_clients * bits / 8,
    )


def server_requests(
    config: PlacementConfig, model: ModelSize, request: Request, *, num_rounds: int, first_round: int, seed: int
) -> tuple[np.ndarray, list[FmRound]]:
    """(bool [num_rounds], whether the server has answers; each round's costs) where the server wants the same answers
    from round first_round (from 0) on."""
    up, cached, rounds = way_up(config, num_rounds, seed), False, []
    for r in range(num_rounds):
        if r < first_round:
            rounds.append(FmRound())
            continue
        rounds.append(ask(config, model, request, asker="server", up=bool(up[r]), cached=cached))
        cached |= rounds[-1].served in ("live", "fallback")
    return np.asarray([found.served not in ("", "none") for found in rounds]), rounds


def client_requests(
    config: PlacementConfig, model: ModelSize, requests: list[Request], *, seed: int
) -> tuple[np.ndarray, FmRound]:
    """(bool [C], which client was answered; the costs together) where every client asks once before it trains, one a
    step of the chain of outages. They wait side by side: seconds are the longest."""
    up = way_up(config, len(requests), seed)
    found = [
        ask(config, model, request, asker="client", up=bool(ok), cached=False) if request.num_texts else FmRound()
        for request, ok in zip(requests, up)
    ]
    answered = np.asarray([one.served in ("live", "fallback") for one in found])
    kinds = [one.served for one in found if one.served]
    total = FmRound(
        served=max(kinds, key=kinds.count) if kinds else "",
        seconds=max((one.seconds for one in found), default=0.0),
        joules=sum(one.joules for one in found),
        bytes_up=sum(one.bytes_up for one in found),
        bytes_down=sum(one.bytes_down for one in found),
        price=sum(one.price for one in found),
        texts=sum(one.texts for one in found),
        placement=config.placement,
        waited_s=max((one.waited_s for one in found), default=0.0),
    )
    return answered, total


def at_all_clients(model: ModelSize, request: Request, num_clients: int) -> FmRound:
    """A request that every client computes itself, side by side with the others."""
    one = batch_cost(NODES["client"], None, model, request)
    return FmRound(
        served="live",
        seconds=one.latency_s,
        joules=num_clients * one.energy_j,
        texts=num_clients * request.num_texts,
        placement="client",
    )
