"""Joins what clients do, how messages travel and how they are aggregated to one SPMD round.

    for a client:  message = uplink(client(state, batches));   update = aggregator(messages);   server(state, update)

A message that is not finite never reaches the model. A client that is not heard, or whose message is not finite, keeps
the state that it had: its round is void. Only error feedback learns that the message was lost.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fmfl_jax.fed.aggregate import ClientOutput, stack_mean, stack_over_clients, weighted_mean_over_clients
from fmfl_jax.fed.algorithm import ClientReport, Cohort, Delivery, FederatedAlgorithm, Mean, ServerState, Stack
from fmfl_jax.fed.uplink import keep_lost

# Folded into keys; client numbers and local steps stay below.
_UPLINK, _EACH, _SERVER, _ATTACK, _COMBINE = (2**31 - i for i in range(1, 6))


def make_algorithm(
    client: Callable,
    server: Callable,
    *,
    init_server: Callable,
    init_own: Callable | None = None,
    message_like: Callable = lambda params: params,
    delivery: Delivery = Delivery(),
    shared: Callable = lambda params: params,
    personal: Callable | None = None,
    download: Callable = lambda params, extra: params,
) -> FederatedAlgorithm:
    """The algorithm of these parts.

    client(state, frozen, own, key) -> ClientResult, with `own` one client's Cohort (no axis C; own.client_states is
      what the algorithm itself keeps).
    server(state, update) -> (params, opt_state, extra). Where nobody is heard all three stay as they were.
    init_server(params) -> (params, opt_state, extra) to start from.
    init_own(params, client_id) -> what the algorithm keeps at a client; None for nothing.
    message_like, download, shared, personal: see FederatedAlgorithm; `personal` is given the algorithm's own part of a
    client's state.
    """
    uplink, aggregator = delivery.uplink, delivery.aggregator
    stacked = aggregator.combine is not None or delivery.attack is not None or aggregator.exports is not None

    def init(params, seed: int) -> ServerState:
        params, opt_state, extra = init_server(params)
        return ServerState(
            params, opt_state, jnp.zeros((), jnp.int32), jnp.uint32(seed), extra, aggregator.init(message_like(params))
        )

    def init_client(params, client_id):
        parts = {}
        if init_own is not None:
            parts["own"] = init_own(params, client_id)
        if uplink is not None:
            parts["uplink"] = uplink.init(message_like(params))
        if delivery.substitute_lost:
            parts["last"] = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), message_like(params))
        return parts

    def round(state: ServerState, frozen, cohort: Cohort):
        round_key = jax.random.fold_in(jax.random.key(state.seed), state.round)
        server_key = jax.random.fold_in(round_key, _SERVER)

        def one(own: Cohort) -> ClientOutput:
            key = jax.random.fold_in(round_key, own.client_ids)
            before = own.client_states
            result = client(state, frozen, own._replace(client_states=before["own"] if init_own else ()), key)
            message, scalars, after = result.message, result.scalars, {}
            finite = _all_finite((message, scalars, result.own))
            if uplink is not None:
                message, sent, bits = uplink.apply(message, before["uplink"], jax.random.fold_in(key, _UPLINK))
                scalars = scalars | {"payload_bits": bits, "entropy_bits": sent.entropy_bits}
                after["uplink"] = keep_lost(sent, message, own.heard)
                finite &= _all_finite((message, after["uplink"]))
            told = own.heard & finite
            if init_own is not None:
                after["own"] = result.own
            counts = told
            if delivery.substitute_lost:
                message = after["last"] = _choose(told, message, before["last"])
                counts = told | ~own.heard
            if not stacked and aggregator.each is not None:
                message, more = aggregator.each(message, state.aggregation, jax.random.fold_in(key, _EACH))
                scalars = scalars | more
            kept = {name: _choose(finite if name == "uplink" else told, after[name], before[name]) for name in after}
            return ClientOutput(message, scalars, (kept, scalars), counts, told)

        exports = ()
        if stacked:
            stack, mean, counts, kept = stack_over_clients(one, cohort, delivery.clients_per_pass)
            if aggregator.needs_reference:
                stack = stack._replace(reference=_reference(state, frozen, cohort, round_key))
            mean, exports, found = _combined(stack, mean, state, round_key)
        else:
            mean, counts, kept = weighted_mean_over_clients(one, cohort, delivery.clients_per_pass)
            found = {}
        update, aggregation = mean.update, state.aggregation
        if aggregator.finish is not None:
            update, aggregation, more = aggregator.finish(mean, state.aggregation, server_key)
            found = found | more
        if aggregator.always:
            moved = True
        else:  # a round that nobody survives leaves the server as it was
            moved = mean.weight > 0
        old = (state.params, state.opt_state, state.extra, state.aggregation)
        params, opt_state, extra, aggregation = _choose(moved, (*server(state, update), aggregation), old)
        metrics = (
            _or_nan(counts["counted_clients"] > 0, mean.scalars)
            | {"delta_norm": optax.tree.norm(update), "examples": mean.normalizer}
            | counts
            | found
        )
        new = ServerState(params, opt_state, state.round + 1, state.seed, extra, aggregation)
        return new, metrics, ClientReport(*kept, exports)

    def _reference(state, frozen, cohort, round_key):
        """The message of a client that holds the server's own data."""
        own = jax.tree.map(lambda x: x[0], cohort._replace(root=None))._replace(batches=cohort.root, client_states=())
        return client(state, frozen, own, jax.random.fold_in(round_key, _SERVER)).message

    def _combined(stack: Stack, mean: Mean, state: ServerState, round_key):
        """(Mean with its update, exports, metrics) of the stacked messages."""
        found, stack = {}, stack._replace(params=state.params)
        if delivery.attack is not None:
            attacked = delivery.attack(stack, stack.extras["malicious"], jax.random.fold_in(round_key, _ATTACK))
            stack, mean = _without_infinite(stack._replace(messages=attacked), mean)
        if aggregator.each is not None:
            keys = jax.random.split(jax.random.fold_in(round_key, _EACH), stack.weights.shape[0])
            messages, scalars = jax.vmap(aggregator.each, in_axes=(0, None, 0))(stack.messages, state.aggregation, keys)
            stack = stack._replace(messages=messages)
            mean = mean._replace(scalars=mean.scalars | _weighted_means(scalars, stack.weights))
        if aggregator.combine is None:
            update = stack_mean(stack)
        else:
            update, found = aggregator.combine(stack, state.aggregation, jax.random.fold_in(round_key, _COMBINE))
        exports = () if aggregator.exports is None else aggregator.exports(stack, state.aggregation)
        return mean._replace(update=update), exports, found

    has_states = init_own is not None or uplink is not None or delivery.substitute_lost
    seen = None if personal is None else lambda params, parts: personal(params, parts.get("own", ()))
    return FederatedAlgorithm(init, round, init_client if has_states else None, shared, seen, message_like, download)


def _without_infinite(stack: Stack, mean: Mean):
    """An attack may overflow: such messages are dropped like those that came so from the client."""
    finite = jax.vmap(_all_finite)(stack.messages)
    keep = lambda x: jnp.where(finite, x, 0.0)
    messages = jax.tree.map(
        lambda x: jnp.where(finite.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros_like(x)), stack.messages
    )
    stack = stack._replace(messages=messages, weights=keep(stack.weights), normalizers=keep(stack.normalizers))
    return stack, mean._replace(weight=jnp.sum(stack.weights), normalizer=jnp.sum(stack.normalizers))


def _weighted_means(scalars: dict, weights):
    total = jnp.sum(weights)
    safe = jnp.where(total > 0, total, 1.0)
    return jax.tree.map(lambda x: jnp.sum(jnp.where(weights > 0, weights * x, 0.0)) / safe, scalars)


def _or_nan(condition, scalars: dict) -> dict:
    """The means, NaN where they are over nobody."""
    return {name: jnp.where(condition, x, jnp.nan) for name, x in scalars.items()}


def _choose(condition, new, old):
    """new where the condition holds, else old, over trees."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _all_finite(tree):
    """bool scalar; integers are always finite."""
    leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.bool_(True)
