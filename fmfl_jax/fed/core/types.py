"""The shape of a federated algorithm: two pure functions, in the manner of FedJAX (Ro et al., 2021).

What clients do, how their messages travel and how one update is made of many are separate parts: an algorithm's file
has the first (`ClientResult`), `Delivery` the second, an `Aggregator` the third; fed/round.py joins them to a round.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

AXIS = "clients"  # the SPMD axis that a round's psum runs over


class Cohort(NamedTuple):
    """The clients of one round that one device trains; every leaf but `root` has the leading axis C.

    client_ids: int32 [C]; they seed each client's randomness, so the order of clients changes nothing.
    weights: float32 [C], number of examples, or 0 for padding and for clients that do not count.
    batches: pytree of arrays [C, S, ...], one slice per local step.
    normalizers: float32 [C], what each client adds to the denominator of the mean; None: its weight if it is heard.
      With inverse-probability weights it is the number of examples, of a client that was not heard too.
    client_states: pytree of arrays [C, ...] that the clients keep between rounds, for algorithms that have any.
    heard: bool [C], whose message arrives; None: those with a weight.
    extras: {name: array [C, ...]}: what a part of the round wants to know of each client. "num_steps" int32: local
      steps where clients take different numbers of them; "malicious" bool: who attacks; "gain" float32: the channel's.
    root: batches [S, ...] of the server's own data, for aggregators that compare with them; the same on every device.
    """

    client_ids: jax.Array
    weights: jax.Array
    batches: Any
    normalizers: Any = None
    client_states: Any = ()
    heard: Any = None
    extras: Any = {}  # never written to
    root: Any = None


class ServerState(NamedTuple):
    """What the server keeps between rounds; all of it is checkpointed.

    params: trainable parameters, {name: array}. opt_state: the server optimizer's. round: int32 scalar, rounds done.
    seed: uint32 scalar; with `round` it determines all randomness and the position in every client's data.
    extra: the algorithm's own (SCAFFOLD's control variate). aggregation: the aggregator's (an adaptive clipping norm).
    """

    params: Any
    opt_state: Any
    round: jax.Array
    seed: jax.Array
    extra: Any = ()
    aggregation: Any = ()


class ClientResult(NamedTuple):
    """One client's work of a round. message: pytree that is sent; for most algorithms the delta, server - client.
    scalars: float32 scalars for the metrics, "loss" among them. own: what the algorithm keeps at this client."""

    message: Any
    scalars: dict
    own: Any = ()


class Stack(NamedTuple):
    """All clients' messages, the same on every device, in the cohort's order with the padding at the end.

    messages: pytree [C, ...], zeros for absent clients. weights: float32 [C], 0 for the absent: padding, lost or not
    finite. normalizers: float32 [C]. extras: as in Cohort, of all clients. reference: the server's own message,
    computed on the cohort's `root`; None where the aggregator does not need one. params: the server's, which deltas
    start from. client_ids: int32 [C], for what is random at each client, whatever its place.
    """

    messages: Any
    weights: jax.Array
    normalizers: jax.Array
    extras: dict
    reference: Any = None
    params: Any = None
    client_ids: jax.Array | None = None


class Mean(NamedTuple):
    """update: sum of weight x message / sum of normalizers, or what the aggregator's `combine` gave. scalars: weighted
    means over those who were heard. weight, normalizer: the two sums."""

    update: Any
    scalars: dict
    weight: jax.Array
    normalizer: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aggregator:
    """How one update is made of many messages. The default is the weighted mean. All parts are pure.

    init(template of a message) -> state, kept by the server.
    each(message, state, key) -> (message, scalars): what happens to every client's message before it is combined.
    combine(Stack, state, key) -> (update, metrics); None: the weighted mean, as a running sum that never holds all
      messages at once.
    finish(Mean, state, key) -> (update, state, metrics): noise, adaptive norms. The key is the same on all devices.
    weigh(num_examples float32 [C]) -> weights [C], on the host; None: the number of examples.
    needs_reference: `combine` compares with Stack.reference. always: the update counts even if nobody was heard (noise
      must not tell that a private cohort was empty).
    exports(Stack, state) -> pytree [C, ...] for the host: what a real protocol would carry (secure aggregation).
    """

    init: Callable = lambda template: ()
    each: Callable | None = None
    combine: Callable | None = None
    finish: Callable | None = None
    weigh: Callable | None = None
    needs_reference: bool = False
    always: bool = False
    exports: Callable | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delivery:
    """How messages get from the clients to an update.

    clients_per_pass: how many clients of a device train side by side; None is all.
    uplink: what a message passes on its way (fed/uplink.py); None sends it as it is. Its state (error feedback) is the
      client's: a client that was not heard puts the lost message back, one that is not finite keeps its state.
    attack(Stack, malicious bool [C], key) -> messages: see fed/attacks.py; who attacks stands in extras["malicious"].
    substitute_lost: the last message that arrived (zeros before the first) stands in for one that is lost. The lost
      clients' weights must then be those they would have if heard.
    """

    clients_per_pass: int | None = None
    uplink: Any = None
    aggregator: Aggregator = Aggregator()
    attack: Callable | None = None
    substitute_lost: bool = False


class ClientReport(NamedTuple):
    """What a round tells about each of its clients, [C, ...]. states: their new client_states. scalars: each client's
    own (its loss). exports: see Aggregator."""

    states: Any
    scalars: dict
    exports: Any = ()


@dataclasses.dataclass(frozen=True)
class FederatedAlgorithm:
    """init(params, seed) -> ServerState; round(state, frozen, cohort) -> (ServerState, metrics, ClientReport).

    `round` is one SPMD function: it runs on every device with that device's clients and reduces over the axis
    "clients", so it must be called under pmap or shard_map with that axis (see fed/sharding.py). metrics is a dict of
    float32 scalars, equal on all devices.

    init_client(params, client_id int32) -> what one client keeps between rounds; None where clients keep nothing.
    shared(params) -> the trainable parameters of the model that the server has, for evaluation.
    personal(params, client state) -> those of one client's own model; None where all clients use the shared one.
    message_like(params) -> a tree like a client's message; download(params, extra) -> like what a client receives. Both
      may be called with shapes only, to count bits; the sizes of factors that differ by client are in the scalars.
    """

    init: Callable
    round: Callable
    init_client: Callable | None = None
    shared: Callable = lambda params: params
    personal: Callable | None = None
    message_like: Callable = lambda params: params
    download: Callable = lambda params, extra: params
