"""The words of a federated round: cohort, server state, client update, aggregate; and what an algorithm is made of.

    message = broadcast(server state)
    (update, weight, client state, metrics) = client(message, client state, batches, key)          on every client
    server state <- server(server state, aggregate of the updates)

An algorithm (fed/algorithms, one file each) is these pure functions and what they send. What an update passes on its
way is `Transport`, how many become one is `Aggregator`, how the clients of a device are run is `Execution`
(execution.py); round.py joins them. The structure is FedJAX's (Ro et al., 2021, arXiv:2108.02117), with the client
taken apart in steps.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax
from jax.sharding import Mesh

Array = jax.Array | np.ndarray
Tree = Any  # a pytree of arrays
Params = dict[str, jax.Array]
LossFn = Callable[[Tree, Tree, Tree, jax.Array], jax.Array]
"""(params, frozen, batch, key) -> mean loss over a batch, float32 scalar."""
GradFn = Callable[[Tree, Tree, Tree, jax.Array], tuple[jax.Array, Tree]]
"""(params, frozen, batch, key) -> (loss, grad) of one local step's batch: jax.value_and_grad of a LossFn, or a private
gradient."""
Metrics = dict[str, jax.Array]
Optimizer = optax.GradientTransformation


class ServerState(NamedTuple):
    """What the server keeps between rounds; all of it is checkpointed.

    params: trainable parameters, {name: array}. opt_state: the server optimizer's. round: int32 scalar, rounds done.
    seed: uint32 scalar; with `round` it determines all randomness and the position in every client's data.
    extra: of the algorithm (SCAFFOLD's control variate). aggregator: of the aggregator (an adaptive clipping norm).
    """

    params: Tree
    opt_state: Tree
    round: jax.Array
    seed: jax.Array
    extra: Tree = ()
    aggregator: Tree = ()


class ClientState(NamedTuple):
    """What one client keeps between rounds; () for what it does not. algorithm: as `init_client` and the client update
    give it. codec: what error feedback still owes, warm starts. last_update: the last update that arrived, to stand in
    for a lost one."""

    algorithm: Tree = ()
    codec: Tree = ()
    last_update: Tree = ()


class Cohort(NamedTuple):
    """The clients of one round; every leaf but server_batches has the leading axis C.

    client_ids: int32 [C]; they seed each client's randomness, so the order of clients changes nothing.
    weights: float32 [C], number of examples, or 0 for padding and for clients that do not count.
    batches: pytree of arrays [C, S, ...], one slice per local step.
    denominators: float32 [C], what each client adds to the denominator of the mean; None: its weight if it is
      delivered. With inverse-probability weights it is the number of examples, of a lost client too.
    client_states: ClientState of arrays [C, ...]; () where clients keep nothing.
    delivered: bool [C], whose update arrives; None: those with a weight.
    num_steps: int32 [C], local steps of each client, at most S; None: S.
    extras: {name: array [C, ...]} for attacks and aggregators: "malicious" bool; "snr" float32, linear.
    server_batches: pytree [S, ...] of data that the server holds, for aggregators that compare with them; the same on
      every device.
    """

    client_ids: Array
    weights: Array
    batches: Tree
    denominators: Array | None = None
    client_states: Tree = ()
    delivered: Array | None = None
    num_steps: Array | None = None
    extras: Mapping[str, Array] = {}
    server_batches: Tree = None


class ClientContext(NamedTuple):
    """What one client has to work with in a round, besides its batches. message: what the server sent (`broadcast`).
    frozen: what is not trained. state: what the algorithm kept at this client. client_id: int32 scalar. weight: float32
    scalar. num_steps: int32 scalar, or None for all batches. key: of this client in this round."""

    message: Tree
    frozen: Tree
    state: Tree
    client_id: Array
    weight: Array
    num_steps: Array | None
    key: jax.Array


class ClientResult(NamedTuple):
    """One client's work of a round. update: pytree that is sent; for most algorithms the delta, server - client (the
    pseudo-gradient). weight: float32, of this update in the mean. state: what the algorithm keeps at this client.
    metrics: float32 scalars, "loss" among them."""

    update: Tree
    weight: Array
    state: Tree
    metrics: Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A loop of local steps. step(context, work, batch, key) -> (work, metrics), whose means over the steps are the
    client's. num_steps: how many, over the round's batches again from the first; None: each batch once, and as many as
    the client has. stream: folded into the client's key before the number of the step (fmfl_jax/streams.py)."""

    step: Callable[[ClientContext, Tree, Tree, jax.Array], tuple[Tree, Metrics]]
    num_steps: int | None = None
    stream: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientUpdate:
    """A client's part, taken apart so that any execution runs it: begin(context) -> work; the phases, one after
    another; finish(context, work, metrics) -> ClientResult. `work` is any pytree. client.py runs it."""

    begin: Callable[[ClientContext], Tree]
    phases: tuple[Phase, ...]
    finish: Callable[[ClientContext, Tree, Metrics], ClientResult]


class GatheredUpdates(NamedTuple):
    """All clients' updates, the same on every device, in the cohort's order with the padding at the end.

    updates: pytree [C, ...], zeros for absent clients. weights: float32 [C], 0 for the absent: padding, lost or not
    finite. denominators: float32 [C]. extras: as in Cohort, of all clients. reference: the client update on the
    cohort's server_batches; None where the aggregator does not need one. params: the server's, which
    deltas start from. client_ids: int32 [C], for what is random at each client, whatever its place.
    """

    updates: Tree
    weights: Array
    denominators: Array
    extras: Mapping[str, Array]
    reference: Tree = None
    params: Tree = None
    client_ids: Array | None = None


Attack = Callable[[GatheredUpdates, Array, jax.Array], Tree]
"""(GatheredUpdates, malicious bool [C], key) -> updates; see fed/attacks.py."""


class Aggregate(NamedTuple):
    """update: sum of weight x update / sum of denominators, or what `Aggregator.aggregate` gave. metrics: weighted
    means over the valid clients (delivered and finite). weight, denominator: the two sums."""

    update: Tree
    metrics: Metrics
    weight: jax.Array
    denominator: jax.Array


class SecureSum(NamedTuple):
    """The integers behind an aggregator that shows the server sums alone, for clients that mask their own.

    modulus_bits: m. encode(update, weight, denominator, aggregator state, row int32) -> uint32 [n] below 2^m; row: the
    client's place in the cohort. decode(total uint32 [n], template) -> the mean update. num_values(template) -> n."""

    modulus_bits: int
    encode: Callable[[Tree, Array, Array, Tree, Array], jax.Array]
    decode: Callable[[Array, Tree], Tree]
    num_values: Callable[[Tree], int]


class TransformUpdate(Protocol):
    """(update, aggregator state) -> (update, metrics)."""

    def __call__(self, update: Tree, state: Tree) -> tuple[Tree, Metrics]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aggregator:
    """How one update is made of many. The default is the weighted mean. All parts are pure.

    init(template of an update) -> state, kept by the server.
    transform_update(update, state) -> (update, metrics): what happens to every client's before they are joined.
    aggregate(GatheredUpdates, state, key) -> (update, metrics); None: the weighted mean, as a running sum that never
      holds all updates at once.
    postprocess(Aggregate, state, key) -> (update, state, metrics): noise, adaptive norms. The key is the same on all
      devices.
    weighting(num_examples float32 [C]) -> weights [C], on the host; None: the number of examples.
    needs_reference: `aggregate` compares with GatheredUpdates.reference. counts_empty: the aggregate counts even if no
      update arrived (noise must hide that a private cohort was empty).
    exports(GatheredUpdates, state) -> pytree [C, ...] for the host: what a real protocol would carry.
    update_bits(template) -> bits of one client's update as the aggregator encodes it (secure aggregation).
    secure_sum: the integers of secure aggregation; None elsewhere.
    """

    init: Callable[[Tree], Tree] = lambda template: ()
    transform_update: TransformUpdate | None = None
    aggregate: Callable[[GatheredUpdates, Tree, jax.Array], tuple[Tree, Metrics]] | None = None
    postprocess: Callable[[Aggregate, Tree, jax.Array], tuple[Tree, Tree, Metrics]] | None = None
    weighting: Callable[[np.ndarray], np.ndarray] | None = None
    needs_reference: bool = False
    counts_empty: bool = False
    exports: Callable[[GatheredUpdates, Tree], Tree] | None = None
    update_bits: Callable[[Tree], int] | None = None
    secure_sum: SecureSum | None = None


class Traffic(NamedTuple):
    """Planned bits: uplink of a client's update, downlink of what one receives. Ints, or uplink int64 [C] where clients
    differ."""

    uplink_bits: int | np.ndarray
    downlink_bits: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How the clients of a device are run; see execution.py. clients_per_pass: so many side by side; None is all, 1 is
    one after another. stepwise: one compiled local step, called from Python for every step of every client. mesh:
    ("clients", "model"), where a loss sums over "model" by itself and the frozen arrays lie on the mesh already; None:
    every device is the clients'."""

    clients_per_pass: int | None = None
    stepwise: bool = False
    mesh: Mesh | None = None

    def __post_init__(self):
        if self.stepwise and self.mesh is not None:
            raise ValueError("execution 'steps' takes no mesh")
        if self.clients_per_pass is not None and self.clients_per_pass < 1:
            raise ValueError(f"clients_per_pass must be at least 1, got {self.clients_per_pass}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FederatedAlgorithm:
    """A federated algorithm: data and pure functions that anybody may call.

    init(params, seed) -> ServerState. broadcast(ServerState) -> message, what every client receives.
    client: the ClientUpdate. server(ServerState, Aggregate) -> ServerState with new params, opt_state and extra; the
      rest belongs to the round.
    init_client(params, client_id int32) -> what the algorithm keeps at one client; None where it keeps nothing.
    dispatch(message) -> what it keeps at a client that starts from this message now, for asynchronous servers, where
      clients start at different versions; None where all start from the round's.
    aggregate(GatheredUpdates, key) -> (update, metrics): how the algorithm itself joins updates; it then takes no other
      aggregator, codec or substitute; None: any.
    substitutable: whether an earlier update may stand in for a lost one.
    shared(params) -> the trainable parameters of the model that the server has, for evaluation.
    personal(params, client state) -> those of one client's personal model; None where all clients use the shared one.
    update_like(params) -> a tree like a client's update. It may be called with shapes only, to count bits.
    traffic(ServerState of shapes, client_ids [C], client states [C] or None for those at the start, cohort_size) ->
      Traffic; None: the sizes of update_like and of the message. traffic_follows_states: ask it again every round.
    """

    init: Callable[[Tree, int], ServerState]
    client: ClientUpdate
    server: Callable[[ServerState, Aggregate], ServerState]
    broadcast: Callable[[ServerState], Tree] = lambda state: state.params
    init_client: Callable[[Tree, jax.Array], Tree] | None = None
    dispatch: Callable[[Tree], Tree] | None = None
    aggregate: Callable[[GatheredUpdates, jax.Array], tuple[Tree, Metrics]] | None = None
    substitutable: bool = True
    shared: Callable[[Tree], Tree] = lambda params: params
    personal: Callable[[Tree, Tree], Tree] | None = None
    update_like: Callable[[Tree], Tree] = lambda params: params
    traffic: Callable[[ServerState, np.ndarray, Tree, int], Traffic] | None = None
    traffic_follows_states: bool = False
