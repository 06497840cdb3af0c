"""Joins algorithm, transport, attack and aggregator to one SPMD round.

    _client_pass   every client: local work, codec, substitute for a lost update, transform
    _join          all clients, where updates are gathered: attack, transform, mean or other aggregate
    _server_step   postprocess, the algorithm's server update

An update that is not finite never reaches the model. A client that is not delivered, or whose update is not finite,
keeps the state that it had: its round is void. Only error feedback learns that the update was lost. A round in which
nothing arrives leaves the server as it was.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fmfl_jax import streams
from fmfl_jax.fed.core.client import run_client
from fmfl_jax.fed.core.reduce import (
    ClientOutput,
    beside,
    divided,
    gather_over_clients,
    gathered_mean,
    mean_over_clients,
)
from fmfl_jax.fed.core.types import (
    Aggregate,
    Aggregator,
    Array,
    Attack,
    ClientContext,
    ClientResult,
    ClientState,
    Cohort,
    Execution,
    FederatedAlgorithm,
    GatheredUpdates,
    Metrics,
    ServerState,
    Traffic,
    Tree,
)
from fmfl_jax.transport.codec import Codec, keep_lost
from fmfl_jax.transport.size import tree_bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transport:
    """What an update passes on its way. codec: how it is coded (fmfl_jax/transport); None sends it as it is. Its state
    (error feedback) is the client's: a client that is not delivered puts the lost update back, one that is not finite
    keeps its state. substitute_lost: the last update that arrived (zeros before the first) stands in for one that is
    lost. The lost clients' weights must then be those that they would have if delivered."""

    codec: Codec | None = None
    substitute_lost: bool = False


class ClientReport(NamedTuple):
    """What a round says of each of its clients, [C, ...]. states: their new ClientState. metrics: of each client (its
    loss). exports: see Aggregator."""

    states: Tree
    metrics: Metrics
    exports: Tree = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """One federated round of these parts; see `make_round`. `spmd` is one SPMD function: it runs on every device with
    that device's clients and reduces over the axis "clients" (execution.py compiles it)."""

    algorithm: FederatedAlgorithm
    transport: Transport = Transport()
    aggregator: Aggregator = Aggregator()
    attack: Attack | None = None
    execution: Execution = Execution()

    def init(self, params: Tree, seed: int) -> ServerState:
        """The server before the first round."""
        state = self.algorithm.init(params, seed)
        return state._replace(aggregator=self.aggregator.init(self.algorithm.update_like(state.params)))

    @property
    def keeps_client_states(self) -> bool:
        """Whether clients keep anything between rounds."""
        return bool(self.algorithm.init_client or self.transport.codec or self.transport.substitute_lost)

    def init_client(self, params: Tree, client_id: jax.Array) -> ClientState:
        """One client before its first round. params: the server's, as `init` was given them."""
        algorithm, update = self.algorithm, self.algorithm.update_like(params)
        return ClientState(
            () if algorithm.init_client is None else algorithm.init_client(params, client_id),
            () if self.transport.codec is None else self.transport.codec.init(update),
            optax.tree.zeros_like(update) if self.transport.substitute_lost else (),
        )

    def traffic(self, state: ServerState, client_ids, client_states: Tree, cohort_size: int) -> Traffic:
        """Planned bits of these clients; `state` may be of shapes only. client_states: the algorithm's, [C, ...], or
        None for those at the start."""
        update, message = self.algorithm.update_like(state.params), jax.eval_shape(self.algorithm.broadcast, state)
        if self.algorithm.traffic is not None:
            planned = self.algorithm.traffic(state, client_ids, client_states, cohort_size)
        else:
            planned = Traffic(tree_bits(update), tree_bits(message))
        if self.aggregator.update_bits is not None:
            return planned._replace(uplink_bits=self.aggregator.update_bits(update))
        if self.transport.codec is not None and (bits := self.transport.codec.exact_bits(update)) is not None:
            return planned._replace(uplink_bits=bits)
        return planned

    def spmd(
        self, state: ServerState, frozen: Tree, cohort: Cohort, *, trained: bool = False
    ) -> tuple[ServerState, Metrics, ClientReport]:
        """(new state, metrics float32 equal on all devices, ClientReport) of this device's clients, [C, ...].

        trained: the local work is done already, and cohort.batches are its ClientResults (stepwise execution)."""
        gathers = (
            self.aggregator.aggregate is not None or self.aggregator.exports is not None or self.attack is not None
        )

        def one(member: Cohort) -> ClientOutput:
            context = client_context(self.algorithm, state, frozen, member)
            result = member.batches if trained else run_client(self.algorithm.client, context, member.batches)
            return _client_pass(self, state, member, context.key, result, transforms=not gathers)

        if gathers:
            gathered, aggregate, counts, reports = gather_over_clients(one, cohort, self.execution.clients_per_pass)
            if self.aggregator.needs_reference:
                reference = cohort.server_batches
                if not trained:
                    context = server_context(self.algorithm, state, frozen)
                    reference = run_client(self.algorithm.client, context, cohort.server_batches)
                gathered = gathered._replace(reference=reference.update)
            aggregate, exports, metrics = _join(self, state, gathered, aggregate)
        else:
            aggregate, counts, reports = mean_over_clients(one, cohort, self.execution.clients_per_pass)
            exports, metrics = (), {}
        state, figures, more = _server_step(self, state, aggregate)
        means = _or_nan(counts["counted_clients"] > 0, aggregate.metrics)
        metrics = means | figures | counts | metrics | more
        states, of_clients = reports
        return state, metrics, ClientReport(states, of_clients, exports)


def make_round(
    algorithm: FederatedAlgorithm,
    *,
    transport: Transport = Transport(),
    aggregator: Aggregator = Aggregator(),
    attack: Attack | None = None,
    execution: Execution = Execution(),
) -> Round:
    """The round of these parts.

    Raises ValueError where the algorithm joins updates by itself (products of LoRA factors) and another aggregator, a
    codec (its residual belongs to other factors) or substitute_lost is asked for, for substitute_lost where every
    update must be counted once, and for an aggregator with a reference where clients need a state: the server has none.
    """
    if (aggregate := algorithm.aggregate) is not None:
        if aggregator != Aggregator():
            raise ValueError("this algorithm aggregates products of factors: it takes no other aggregator")
        if transport.codec is not None:
            raise ValueError("this algorithm sends factors of each client's rank, not deltas: it takes no codec")
        aggregator = Aggregator(aggregate=lambda gathered, state, key: aggregate(gathered, key))
    if aggregator.needs_reference and algorithm.init_client is not None:
        raise ValueError("this algorithm's clients keep a state, which the server's reference would need too")
    if transport.substitute_lost and (algorithm.aggregate is not None or not algorithm.substitutable):
        raise ValueError("this algorithm counts every update once: substitute_lost would repeat one")
    return Round(algorithm=algorithm, transport=transport, aggregator=aggregator, attack=attack, execution=execution)


def round_key(state: ServerState) -> jax.Array:
    """The key of the round that comes next."""
    return jax.random.fold_in(jax.random.key(state.seed), state.round)


def client_key(state: ServerState, client_id) -> jax.Array:
    """The key of a client in the round that comes next; only `round` and `seed` of the state are read."""
    return jax.random.fold_in(round_key(state), client_id)


def kept_state(before: ClientState, after: ClientState, *, delivered, finite) -> ClientState:
    """What a client keeps of a round: nothing new of one that was lost or is not finite, but for error feedback, which
    learns of a loss (`after.codec` is what `keep_lost` gave). delivered, finite: bool scalars."""
    valid = delivered & finite
    return ClientState(
        _choose(valid, after.algorithm, before.algorithm),
        _choose(finite, after.codec, before.codec),
        _choose(valid, after.last_update, before.last_update),
    )


def client_context(algorithm: FederatedAlgorithm, state: ServerState, frozen: Tree, member: Cohort) -> ClientContext:
    """What one client of the cohort (its leaves without the axis C) has to work with."""
    kept = member.client_states.algorithm if algorithm.init_client is not None else ()
    key = client_key(state, member.client_ids)
    return ClientContext(
        algorithm.broadcast(state), frozen, kept, member.client_ids, member.weights, member.num_steps, key
    )


def server_context(algorithm: FederatedAlgorithm, state: ServerState, frozen: Tree) -> ClientContext:
    """That of a client that holds the server's data and has no state, for the reference of an aggregator."""
    key = jax.random.fold_in(round_key(state), streams.SERVER)
    return ClientContext(algorithm.broadcast(state), frozen, (), jnp.int32(0), jnp.float32(1), None, key)


def _client_pass(
    parts: Round, state: ServerState, member: Cohort, key: jax.Array, result: ClientResult, *, transforms: bool
) -> ClientOutput:
    """From a client's result to what is joined, and what it keeps."""
    assert member.delivered is not None  # cohort.lay_out fills it in
    transport, before = parts.transport, member.client_states
    update, metrics, after = result.update, result.metrics, ClientState(algorithm=result.state)
    finite = all_finite((update, metrics, result.state))
    if transport.codec is not None:
        update, coded, bits = transport.codec.apply(update, before.codec, jax.random.fold_in(key, streams.CODEC))
        metrics = metrics | {"payload_bits": bits, "entropy_bits": coded.entropy_bits}
        after = after._replace(codec=keep_lost(coded, update, member.delivered))
        finite &= all_finite((update, after.codec))
    valid = member.delivered & finite
    contributes = valid
    if transport.substitute_lost:
        update = _choose(valid, update, before.last_update)
        after = after._replace(last_update=update)
        contributes = valid | ~member.delivered
    if transforms and parts.aggregator.transform_update is not None:
        update, more = parts.aggregator.transform_update(update, state.aggregator)
        metrics = metrics | more
    states = ()
    if parts.keeps_client_states:
        states = kept_state(before, after, delivered=member.delivered, finite=finite)
    return ClientOutput(update, metrics, (states, metrics), contributes, valid, result.weight)


def _join(parts: Round, state: ServerState, gathered: GatheredUpdates, aggregate: Aggregate):
    """(Aggregate with its update, exports, metrics) of the gathered updates."""
    aggregator, metrics, gathered = parts.aggregator, {}, gathered._replace(params=state.params)
    if parts.attack is not None:
        attack_key = jax.random.fold_in(round_key(state), streams.ATTACK)
        attacked = parts.attack(gathered, gathered.extras["malicious"], attack_key)
        gathered, aggregate = _without_infinite(gathered._replace(updates=attacked), aggregate)
    if aggregator.transform_update is not None:
        updates, scalars = jax.vmap(aggregator.transform_update, in_axes=(0, None))(gathered.updates, state.aggregator)
        gathered = gathered._replace(updates=updates)
        aggregate = aggregate._replace(metrics=aggregate.metrics | _weighted_means(scalars, gathered.weights))
    if aggregator.aggregate is None:
        update = gathered_mean(gathered)
    else:
        key = jax.random.fold_in(round_key(state), streams.AGGREGATE)
        update, metrics = aggregator.aggregate(gathered, state.aggregator, key)
    exports = () if aggregator.exports is None else aggregator.exports(gathered, state.aggregator)
    return aggregate._replace(update=update), exports, metrics


def _server_step(parts: Round, state: ServerState, aggregate: Aggregate) -> tuple[ServerState, Metrics, Metrics]:
    """(the next state, the metrics of every round, those of the postprocessing)."""
    aggregator, kept, metrics = parts.aggregator, state.aggregator, {}
    if aggregator.postprocess is not None:
        key = jax.random.fold_in(round_key(state), streams.SERVER)
        update, kept, metrics = aggregator.postprocess(aggregate, state.aggregator, key)
        aggregate = aggregate._replace(update=update)
    new = parts.algorithm.server(state, aggregate)._replace(aggregator=kept)
    if not aggregator.counts_empty:  # a round that nothing survives leaves the server as it was
        new = _choose(aggregate.weight > 0, new, state)
    figures = {"delta_norm": optax.tree.norm(aggregate.update), "examples": aggregate.denominator}
    return new._replace(round=state.round + 1, seed=state.seed), figures, metrics


def _without_infinite(gathered: GatheredUpdates, aggregate: Aggregate):
    """An attack may overflow: such updates are dropped like those that came so from the client."""
    finite = jax.vmap(all_finite)(gathered.updates)
    keep = lambda x: jnp.where(finite, x, 0.0)
    updates = jax.tree.map(lambda x: jnp.where(beside(finite, x), x, jnp.zeros_like(x)), gathered.updates)
    gathered = gathered._replace(
        updates=updates, weights=keep(gathered.weights), denominators=keep(gathered.denominators)
    )
    sums = {"weight": jnp.sum(gathered.weights), "denominator": jnp.sum(gathered.denominators)}
    return gathered, aggregate._replace(**sums)


def _weighted_means(scalars: Metrics, weights) -> Metrics:
    return divided(jax.tree.map(lambda x: jnp.sum(jnp.where(weights > 0, weights * x, 0.0)), scalars), jnp.sum(weights))


def _or_nan(condition, means: Metrics) -> Metrics:
    """The means, NaN where they are over nobody."""
    return {name: jnp.where(condition, x, jnp.nan) for name, x in means.items()}


def _choose(condition: Array, new: Tree, old: Tree) -> Tree:
    """new where the condition holds, else old, over trees."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def all_finite(tree: Tree):
    """bool scalar: whether an update counts at all; integers are always finite."""
    leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    # without the barrier XLA copies the whole chain of conditions into each of its users, as many as there are leaves
    return jax.lax.optimization_barrier(jnp.all(jnp.stack(leaves))) if leaves else jnp.bool_(True)
