"""The weighted mean of encoded updates: secure aggregation (Bonawitz et al., CCS 2017) as an `Aggregator`.

    update = decode(sum_c encode(w_c / w_max m_c) mod 2^m) / decode(sum_c encode(n_c / w_max) mod 2^m)

with weights w and denominators n, of which the server learns the sums alone.

The device forms the modular sum itself; `run_on_host` carries the same integers through the protocol and compares.
"""

import dataclasses
import os
from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.fed.core.reduce import divided
from fmfl_jax.fed.core.types import Aggregator, GatheredUpdates, SecureSum, Tree
from fmfl_jax.fed.secure import fixed_point
from fmfl_jax.fed.secure.fixed_point import FixedPoint
from fmfl_jax.fed.secure.protocol import ProtocolResult, run_protocol


class SecureState(NamedTuple):
    """inner: of the inner aggregator. round: uint32, rounds that counted; stochastic rounding draws from it."""

    inner: Tree
    round: jax.Array


class Encoded(NamedTuple):
    """vectors: uint32 [C, n], what each client masks, zeros of the absent. present: bool [C]. total: uint32 [n], the
    modular sum as the device makes it."""

    vectors: jax.Array
    present: jax.Array
    total: jax.Array


def secure(inner: Aggregator | None, codec: FixedPoint, *, max_weight: float, seed: int = 0) -> Aggregator:
    """The mean over integers modulo 2^m, with what `inner` does before it (`transform_update`: clipping) and after it
    (`postprocess`: noise). Its noise must cover fixed_point.rounding_norm as well.

    max_weight: the largest weight, known to all; larger ones, and larger denominators, count as this. seed: of
    stochastic rounding, which draws by a client's place in the cohort. Denominators of clients that send nothing (there
    are some with inverse-probability weights) are taken as known to the server.

    Metrics of `aggregate`: "secure_clipped_share" of the values of the updates that arrived, "secure_capped_weights"
    how many of them weigh more than max_weight. Only a simulation sees these. `exports` gives Encoded. Absent clients
    add nothing and an empty cohort gives zeros. More clients than the codec has room for: ValueError when traced.

    Raises ValueError for an inner aggregator that has to see single updates, and for max_weight <= 0.
    """
    inner = Aggregator() if inner is None else inner
    if inner.aggregate is not None or inner.exports is not None or inner.needs_reference:
        raise ValueError("secure aggregation shows the server sums alone; this aggregator compares single updates")
    if not max_weight > 0:
        raise ValueError(f"max_weight must be positive, got {max_weight}")

    def init(template):
        return SecureState(inner.init(template), jnp.zeros((), jnp.uint32))

    def aggregate(gathered: GatheredUpdates, state: SecureState, key):
        del key  # `exports` has none: what both encode must be the same
        message, clipped = _encode(codec, gathered, state, max_weight, seed)
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), gathered.updates)
        update, denominator = fixed_point.decode(codec, message.total, template)
        public = jnp.sum(jnp.where(message.present, 0.0, gathered.denominators)) / jnp.float32(max_weight)
        arrived = jnp.sum(message.present.astype(jnp.float32))
        metrics = {
            "secure_clipped_share": divided(jnp.sum(jnp.where(message.present, clipped, 0.0)), arrived),
            "secure_capped_weights": jnp.sum((gathered.weights > max_weight).astype(jnp.float32)),
        }
        return divided(update, denominator + public), metrics

    def postprocess(mean, state: SecureState, key):
        if inner.postprocess is None:
            return mean.update, state._replace(round=state.round + 1), {}
        update, after, metrics = inner.postprocess(mean, state.inner, key)
        return update, SecureState(after, state.round + 1), metrics

    transform_update = None
    if (inner_transform := inner.transform_update) is not None:
        transform_update = lambda update, state: inner_transform(update, state.inner)
    return dataclasses.replace(
        inner,
        init=init,
        transform_update=transform_update,
        aggregate=aggregate,
        postprocess=postprocess,
        exports=lambda gathered, state: _encode(codec, gathered, state, max_weight, seed)[0],
        update_bits=lambda template: fixed_point.payload_bits(codec, template),
        secure_sum=SecureSum(
            codec.modulus_bits,
            lambda update, weight, denominator, state, row: _encode_one(
                codec, (update, weight, denominator, row), state, max_weight, seed
            )[0],
            lambda total, template: divided(*fixed_point.decode(codec, total, template)),
            lambda template: fixed_point.vector_size(codec, template),
        ),
    )


def of_total(aggregator: Aggregator) -> Aggregator:
    """A secure aggregator for a server that has the sum from the protocol and nothing else: uint32 [n], as
    GatheredUpdates.reference. What is done to single updates was done at the clients. Raises ValueError for an
    aggregator that is not secure."""
    if (secure_sum := aggregator.secure_sum) is None:
        raise ValueError("this aggregator is not secure")

    def aggregate(gathered: GatheredUpdates, state: SecureState, key):
        del state, key
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), gathered.updates)
        return secure_sum.decode(gathered.reference, template), {}

    return dataclasses.replace(
        aggregator, transform_update=None, aggregate=aggregate, needs_reference=True, exports=None
    )


def _encode(codec: FixedPoint, gathered: GatheredUpdates, state: SecureState, max_weight: float, seed: int):
    """(Encoded, clipped [C])."""
    rows = jnp.arange(gathered.weights.shape[0], dtype=jnp.int32)
    clients = (gathered.updates, gathered.weights, gathered.denominators, rows)
    vectors, clipped = jax.vmap(lambda *client: _encode_one(codec, client, state, max_weight, seed))(*clients)
    return Encoded(vectors, jnp.asarray(gathered.weights) > 0, fixed_point.modular_sum(codec, vectors)), clipped


def _encode_one(codec: FixedPoint, client, state: SecureState, max_weight: float, seed: int):
    """(uint32 [n], clipped) of one client: (update, weight, denominator, its place in the cohort)."""
    update, weight, denominator, row = client
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.round), row)
    return fixed_point.encode(
        codec, update, weight / jnp.float32(max_weight), denominator / jnp.float32(max_weight), key
    )


def run_on_host(
    encoded: Encoded,
    client_ids: Collection[int],
    codec: FixedPoint,
    *,
    threshold: int,
    drop_after_masking: Collection[int] = (),
    random: Callable[[int], bytes] = os.urandom,
) -> ProtocolResult:
    """Carries a round's integers through the real protocol and compares its sum with the device's, bit for bit.

    encoded: arrays of one device. client_ids: of the cohort without its padding, in its order; those whose message is
    absent drop out before they mask. Raises ProtocolError when fewer than `threshold` are left (in a real network this
    round would have no result) and RuntimeError should the two sums differ.
    """
    vectors = dict(zip((int(client) for client in client_ids), np.asarray(encoded.vectors)))
    absent = [client for client, present in zip(vectors, np.asarray(encoded.present)) if not present]
    result = run_protocol(
        vectors,
        threshold=threshold,
        modulus_bits=codec.modulus_bits,
        drop_before_masking=absent,
        drop_after_masking=drop_after_masking,
        random=random,
    )
    if not np.array_equal(result.total, np.asarray(encoded.total)):
        raise RuntimeError("secure aggregation and the device found different sums")
    return result
