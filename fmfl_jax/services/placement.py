"""Where the foundation model answers (section II-C, Fig. 3): cloud, edge or client; what it costs there, and why there.

    prefill_s = max(2 N P / compute_flops, weight_bytes / bandwidth)
    token_s   = max(2 N / compute_flops, (weight_bytes + kv_bytes (P + t)) / bandwidth),   t = 0..n - 1 tokens before it
    latency   = up bits / rate + rtt + queue + prefill + tokens + down bits / rate

with N parameters, P tokens of prompt and n of output (Kaplan et al. 2020 for 2 N; the memory-bound decoding of, e.g.,
Pope et al., MLSys 2023). An idle cloud is faster than an edge of a few TFLOP/s at any usual round trip. Outage, price,
privacy or load justify the edge, and `choose` says which.

    >>> options = [Option("cloud", request_cost(cloud, link, model, request), up=False), ...]
    >>> choose(options, Limits())            # fallback, "edge", first choice "cloud", reason "outage"
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fmfl_jax.finite import finite_fields
from fmfl_jax.services.checks import at_least, positive, share

SERVED = ("live", "cached", "fallback", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class Node:
    """A machine that holds the model. compute_flops: sustained FLOP/s. memory_bandwidth_bytes_s: byte/s.
    price_per_s: of own hardware while it computes; price_per_token: of an API, prompt and output alike.
    active_power_w: while it computes. availability: share of the time that it is up (`outage.py` draws it)."""

    name: str
    compute_flops: float
    memory_bandwidth_bytes_s: float
    memory_bytes: float
    price_per_s: float = 0.0
    price_per_token: float = 0.0
    active_power_w: float = 0.0
    availability: float = 1.0

    def __post_init__(self):
        positive(
            compute_flops=self.compute_flops,
            memory_bandwidth_bytes_s=self.memory_bandwidth_bytes_s,
            memory_bytes=self.memory_bytes,
        )
        at_least(
            0,
            price_per_s=self.price_per_s,
            price_per_token=self.price_per_token,
            active_power_w=self.active_power_w,
        )
        share("availability", self.availability)


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class Link:
    """From the client to a node and back: rate_bps each way, rtt_s, price_per_bit, energy_j_per_bit sent or
    received. Several hops are one link with the least rate and the sums of the rest."""

    rate_bps: float
    rtt_s: float = 0.0
    price_per_bit: float = 0.0
    energy_j_per_bit: float = 0.0

    def __post_init__(self):
        positive(rate_bps=self.rate_bps)
        at_least(0, rtt_s=self.rtt_s, price_per_bit=self.price_per_bit, energy_j_per_bit=self.energy_j_per_bit)


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class ModelSize:
    """num_params: N that are multiplied; weight_bytes as stored; kv_bytes_per_token: see `kv_bytes_per_token`."""

    num_params: float
    weight_bytes: float
    kv_bytes_per_token: float = 0.0

    def __post_init__(self):
        positive(num_params=self.num_params, weight_bytes=self.weight_bytes)
        at_least(0, kv_bytes_per_token=self.kv_bytes_per_token)


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class RequestSize:
    """prompt_tokens >= 1, output_tokens >= 0 (0: only scored); up_bits, down_bits on the link."""

    prompt_tokens: int
    output_tokens: int
    up_bits: float = 0.0
    down_bits: float = 0.0

    def __post_init__(self):
        at_least(1, prompt_tokens=self.prompt_tokens)
        at_least(0, output_tokens=self.output_tokens, up_bits=self.up_bits, down_bits=self.down_bits)


class Cost(NamedTuple):
    """Of one request at one node: latency_s is transfer_s (with the round trip) + queue_s + compute_s; price; energy_j
    of node and link."""

    latency_s: float
    transfer_s: float
    queue_s: float
    compute_s: float
    price: float
    energy_j: float


class Option(NamedTuple):
    """A placement for one request. up: node and link; fits: the model fits its memory; trusted: private text may go
    there."""

    name: str
    cost: Cost
    up: bool = True
    fits: bool = True
    trusted: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class Limits:
    """Of a request; None is no limit. private: its text may go to trusted placements only."""

    deadline_s: float | None = None
    max_price: float | None = None
    private: bool = False


class Decision(NamedTuple):
    """served: one of SERVED. placement: the node's name, None where the FM did not answer. first_choice: who would
    have, were all up, idle and allowed. reason: what kept the first choice from it ("memory", "privacy", "outage",
    "price", "load", "latency"), "" where it answers."""

    served: str
    placement: str | None
    first_choice: str
    reason: str


class Summary(NamedTuple):
    """Of many requests: shares by SERVED, counts of reasons, latency of those that the FM answered (None: none), mean
    price and energy of a request, and the share that got an answer among those that met an outage (None: none)."""

    shares: dict[str, float]
    reasons: dict[str, int]
    latency_p50_s: float | None
    latency_p95_s: float | None
    mean_price: float
    mean_energy_j: float
    served_in_outage: float | None


def kv_bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, value_bytes: float) -> float:
    """2 L K H bytes: keys and values that every token of context leaves in memory."""
    return 2 * num_layers * num_kv_heads * head_dim * value_bytes


def prefill_s(node: Node, model: ModelSize, prompt_tokens: int, batch: int = 1) -> float:
    """Seconds until `batch` prompts are read."""
    arithmetic = 2 * model.num_params * prompt_tokens * batch / node.compute_flops
    return max(arithmetic, model.weight_bytes / node.memory_bandwidth_bytes_s)


def decode_s(node: Node, model: ModelSize, prompt_tokens: int, output_tokens: int, batch: int = 1) -> float:
    """Seconds for output_tokens steps of `batch` answers side by side; the cache grows by a token a step."""
    context = prompt_tokens + np.arange(output_tokens)
    traffic = (model.weight_bytes + batch * model.kv_bytes_per_token * context) / node.memory_bandwidth_bytes_s
    return float(np.maximum(traffic, 2 * model.num_params * batch / node.compute_flops).sum())


def fits(node: Node, model: ModelSize, request: RequestSize, batch: int = 1) -> bool:
    """Whether weights and the caches of `batch` such requests at their full length fit the node's memory."""
    tokens = request.prompt_tokens + request.output_tokens
    return model.weight_bytes + batch * model.kv_bytes_per_token * tokens <= node.memory_bytes


def request_cost(
    node: Node, link: Link | None, model: ModelSize, request: RequestSize, *, queue_s: float = 0.0, batch: int = 1
) -> Cost:
    """What one request costs at a node; link None is the client's own node.

    batch: equal requests that are computed side by side: each waits for all, and pays its part of seconds and joules.
    """
    at_least(0, queue_s=queue_s)
    at_least(1, batch=batch)
    compute = prefill_s(node, model, request.prompt_tokens, batch)
    compute += decode_s(node, model, request.prompt_tokens, request.output_tokens, batch)
    transfer, price, energy = 0.0, 0.0, 0.0
    if link is not None:
        bits = request.up_bits + request.down_bits
        transfer = bits / link.rate_bps + link.rtt_s
        price, energy = link.price_per_bit * bits, link.energy_j_per_bit * bits
    price += node.price_per_s * compute / batch
    price += node.price_per_token * (request.prompt_tokens + request.output_tokens)
    energy += node.active_power_w * compute / batch
    return Cost(transfer + queue_s + compute, transfer, queue_s, compute, price, energy)


def obstacle(option: Option, limits: Limits) -> str:
    """What keeps a placement from this request, the first of memory, privacy, outage, price, load and latency; "" if
    nothing does. Load: in time if nobody waited; latency: not even then."""
    if not option.fits:
        return "memory"
    if limits.private and not option.trusted:
        return "privacy"
    if not option.up:
        return "outage"
    if limits.max_price is not None and not option.cost.price <= limits.max_price:
        return "price"
    if limits.deadline_s is not None and not option.cost.latency_s <= limits.deadline_s:
        return "load" if option.cost.latency_s - option.cost.queue_s <= limits.deadline_s else "latency"
    return ""


def choose(
    options: Sequence[Option], limits: Limits, *, preferred: str | None = None, cached: bool = False
) -> Decision:
    """Who answers: the first choice live; else the cache; else, as fallback, the fastest placement that may; else none.

    preferred: the first choice by name; None is the placement that would be fastest without a queue, among those whose
    memory fits. Then one that is allowed and faster because of the queues answers live, and the reason is "load".
    cached: whether an answer lies in the cache.

    Raises ValueError for no options, names that repeat and an unknown preferred name.
    """
    by_name = {option.name: option for option in options}
    if not options or len(by_name) != len(options):
        raise ValueError(f"options must be distinct, at least one, got {[option.name for option in options]}")
    if preferred is not None and preferred not in by_name:
        raise ValueError(f"preferred is {preferred!r}, expected one of {list(by_name)}")
    idle_s = lambda option: option.cost.latency_s - option.cost.queue_s
    loaded_s = lambda option: option.cost.latency_s
    if preferred is None:
        first = min([option for option in options if option.fits] or options, key=idle_s)
    else:
        first = by_name[preferred]
    allowed = [option for option in options if not obstacle(option, limits)]
    fastest = min(allowed, key=loaded_s, default=None)
    reason = obstacle(first, limits)
    if not reason:
        faster = preferred is None and fastest is not None and loaded_s(fastest) < loaded_s(first)
        if faster and fastest is not None:
            return Decision("live", fastest.name, first.name, "load")
        return Decision("live", first.name, first.name, "")
    if cached:
        return Decision("cached", None, first.name, reason)
    if fastest is not None:
        return Decision("fallback", fastest.name, first.name, reason)
    return Decision("none", None, first.name, reason)


def summarize(decisions: Sequence[Decision], costs: Sequence[Cost | None]) -> Summary:
    """Over the requests of a run: decisions, and of each what it cost (None: the FM did not compute).

    Raises ValueError for no requests and unequal lengths.
    """
    if not decisions or len(decisions) != len(costs):
        raise ValueError(f"expected a cost for each decision, got {len(decisions)} and {len(costs)}")
    n = len(decisions)
    known = [cost for cost in costs if cost is not None]
    latency = [cost.latency_s for cost in known]
    outages = [decision.served != "none" for decision in decisions if decision.reason == "outage"]
    reasons: dict[str, int] = {}
    for decision in decisions:
        if decision.reason:
            reasons[decision.reason] = reasons.get(decision.reason, 0) + 1
    return Summary(
        shares={kind: sum(d.served == kind for d in decisions) / n for kind in SERVED},
        reasons=reasons,
        latency_p50_s=float(np.percentile(latency, 50)) if latency else None,
        latency_p95_s=float(np.percentile(latency, 95)) if latency else None,
        mean_price=sum(cost.price for cost in known) / n,
        mean_energy_j=sum(cost.energy_j for cost in known) / n,
        served_in_outage=float(np.mean(outages)) if outages else None,
    )
