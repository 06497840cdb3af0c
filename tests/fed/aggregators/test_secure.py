"""Fixed point and the secure mean: no overflow, within a step of the mean, unbiased with few bits, one sum for all."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmfl_jax.fed.aggregators.secure import run_on_host, secure
from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from fmfl_jax.fed.core.cohort import put_on_devices
from fmfl_jax.fed.core.execution import pmap_round
from fmfl_jax.fed.core.round import make_round
from fmfl_jax.fed.core.types import Aggregator, Cohort, GatheredUpdates
from fmfl_jax.fed.secure import fixed_point
from fmfl_jax.fed.secure.fixed_point import FixedPoint
from fmfl_jax.fed.secure.wire import ProtocolError
from fmfl_jax.parallel import replicate

KEY = jax.random.key(0)
ONE = jnp.float32(1.0)
CODEC = FixedPoint(clip=2.0, bits=20, max_clients=16)

encode = jax.jit(fixed_point.encode, static_argnums=0)
decode = jax.jit(fixed_point.decode, static_argnums=0)
modular_sum = jax.jit(fixed_point.modular_sum, static_argnums=0)


def gathered_of(num_clients, seed=0, absent=()):
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 100, num_clients).astype(np.float32)
    weights[list(absent)] = 0.0
    updates = {"w": rng.normal(0.0, 0.3, (num_clients, 4, 6)), "b": rng.normal(0.0, 0.3, (num_clients,))}
    for leaf in updates.values():
        leaf[list(absent)] = 0.0
    return GatheredUpdates(
        jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), updates), *[jnp.asarray(weights)] * 2, {}
    )


def mean_of(gathered):
    """In float64."""
    weights = np.asarray(gathered.weights, np.float64)
    total = np.asarray(gathered.denominators, np.float64).sum()
    return jax.tree.map(lambda x: np.tensordot(weights, np.asarray(x, np.float64), 1) / total, gathered.updates)


def aggregate(aggregator, gathered):
    template = jax.tree.map(lambda x: x[0], gathered.updates)
    return jax.jit(aggregator.aggregate)(gathered, aggregator.init(template), KEY)


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(bits=24, max_clients=257), "could overflow"),
        (dict(bits=17, max_clients=2**15 + 1), "could overflow"),
        (dict(bits=1, max_clients=2), "bits"),
        (dict(bits=25, max_clients=2), "bits"),
        (dict(bits=8, max_clients=0), "max_clients"),
        (dict(bits=8, max_clients=2, clip=0.0), "clip"),
        (dict(bits=8, max_clients=2, clip=math.inf), "clip"),
    ],
)
def test_configurations_that_could_overflow_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        FixedPoint(**(dict(clip=1.0) | settings))


@pytest.mark.parametrize("bits, max_clients", [(24, 256), (2, 8), (9, 5), (17, 1)])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_largest_sum_does_not_overflow(bits, max_clients, sign):
    codec = FixedPoint(clip=0.7, bits=bits, max_clients=max_clients)
    assert codec.modulus_bits == bits + math.ceil(math.log2(max_clients)) <= 32
    one, clipped = encode(codec, [jnp.full(3, sign * 0.7, jnp.float32)], ONE, ONE, KEY)
    assert clipped == 0
    total = modular_sum(codec, jnp.tile(one, (codec.capacity, 1)))
    assert np.all(np.asarray(total) < 2**codec.modulus_bits)
    (decoded,), weight = decode(codec, total, [jnp.zeros(3)])
    np.testing.assert_allclose(decoded, sign * 0.7 * codec.capacity, rtol=1e-6)
    np.testing.assert_allclose(weight, codec.capacity, rtol=1e-6)
    with pytest.raises(ValueError, match="max_clients"):
        modular_sum(codec, jnp.tile(one, (codec.capacity + 1, 1)))


def test_what_saturates_is_counted():
    codec = FixedPoint(clip=1.0, bits=8, max_clients=4)
    values = jnp.asarray([0.5, -1.0, 1.01, -jnp.inf, jnp.nan, 0.0, 3.0, 1.0], jnp.float32)
    encoded, clipped = encode(codec, {"a": values}, ONE, ONE, KEY)
    assert clipped == 4 / 8
    by_hand = [64, -127, 127, -127, 0, 0, 127, 127]  # 63.5 rounds to even
    assert list(np.asarray(encoded[:8])) == [value % 2**10 for value in by_hand]
    halved, clipped = encode(codec, {"a": values}, jnp.float32(0.5), ONE, KEY)
    assert clipped == 3 / 8 and halved[2] == 64  # its weight is applied first
    nothing, clipped = encode(codec, {"a": values}, jnp.float32(0.0), ONE, KEY)
    assert clipped == 0 and not np.any(nothing)


def test_payload_bits_counted_by_hand():
    template = {"w": jnp.zeros((4, 6)), "b": jnp.zeros(())}
    for bits, clients, limbs in ((20, 20, 2), (24, 2, 1), (4, 20, 6), (8, 20, 3)):
        codec = FixedPoint(clip=1.0, bits=bits, max_clients=clients)
        assert fixed_point.payload_bits(codec, template) == (25 + limbs) * (bits + (5 if clients == 20 else 1))
        encoded, _ = encode(codec, template, ONE, ONE, KEY)
        assert encoded.shape == (25 + limbs,)


def test_few_bits_are_unbiased_with_stochastic_rounding_only():
    codec = FixedPoint(clip=1.0, bits=3, max_clients=4096, stochastic=True)  # integers -3 .. 3
    values = jnp.asarray([-1.0, -0.9, -0.4, -0.05, 0.0, 0.1, 0.55, 0.99], jnp.float32)
    keys = jax.random.split(KEY, 4096)

    def mean(codec):
        encoded = jax.vmap(lambda key: encode(codec, values, ONE, ONE, key)[0])(keys)
        return np.asarray(decode(codec, modular_sum(codec, encoded), values)[0]) / 4096

    fraction = np.asarray(values) / codec.step % 1.0
    error = 5 * codec.step * np.sqrt(fraction * (1 - fraction) / 4096) + 1e-6
    assert np.all(np.abs(mean(codec) - values) <= error)
    assert np.sum(np.abs(mean(dataclasses.replace(codec, stochastic=False)) - values) > error) == 6


@pytest.mark.parametrize("stochastic, fraction", [(False, 0.499), (True, 0.05)])
def test_rounding_adds_no_more_than_its_bound_to_the_norm(stochastic, fraction):
    codec = FixedPoint(clip=1.0, bits=6, max_clients=2, stochastic=stochastic)
    value = {"w": jnp.asarray([[fraction * codec.step, (fraction - 7) * codec.step]], jnp.float32)}

    def moved(key):
        decoded, _ = decode(codec, encode(codec, value, ONE, ONE, key)[0], value)
        return jnp.linalg.norm(decoded["w"] - value["w"])

    most = np.max(jax.vmap(moved)(jax.random.split(KEY, 3000))) / fixed_point.rounding_norm(codec, value)
    assert 0.9 < most <= 1.0


@pytest.mark.parametrize("bits", [6, 12, 20, 24])
def test_the_mean_is_within_a_step(bits):
    codec = FixedPoint(clip=2.0, bits=bits, max_clients=16)
    aggregator = secure(None, codec, max_weight=100.0)
    for absent in ((), (0, 3, 7)):
        gathered = gathered_of(9, absent=absent)
        update, metrics = aggregate(aggregator, gathered)
        assert metrics == {"secure_clipped_share": 0.0, "secure_capped_weights": 0.0}
        # Every client's rounding error is half a step at most, in units of the largest weight.
        weights = np.asarray(gathered.weights)
        bound = np.sum(weights > 0) * codec.step / 2 * 100.0 / weights.sum() + 1e-6
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=bound), update, mean_of(gathered))


def test_order_of_clients_and_padding_change_no_bit():
    gathered, aggregator = gathered_of(9, absent=(2,)), secure(None, CODEC, max_weight=100.0)
    order = np.random.default_rng(1).permutation(9)
    turned = jax.tree.map(lambda x: x[order], gathered)
    padded = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros((5, *x.shape[1:]), x.dtype)]), gathered)
    want, _ = aggregate(aggregator, gathered)
    for other in (turned, padded):
        jax.tree.map(np.testing.assert_array_equal, aggregate(aggregator, other)[0], want)


def test_empty_cohorts_and_single_clients():
    aggregator = secure(None, CODEC, max_weight=100.0)
    update, metrics = aggregate(aggregator, gathered_of(3, absent=(0, 1, 2)))
    assert metrics["secure_clipped_share"] == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(update))
    gathered = gathered_of(3, absent=(0, 2))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y[1], atol=1e-3),
        aggregate(aggregator, gathered)[0],
        gathered.updates,
    )


def test_denominators_of_their_own_and_weights_beyond_the_largest():
    gathered = gathered_of(6, absent=(4,))
    # inverse-probability weights: a client that is absent counts in the denominator
    gathered = gathered._replace(denominators=jnp.asarray([10, 20, 5, 8, 40, 3], jnp.float32))
    update, _ = aggregate(secure(None, CODEC, max_weight=100.0), gathered)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), update, mean_of(gathered))
    gathered = gathered_of(6)
    update, metrics = aggregate(secure(None, CODEC, max_weight=20.0), gathered)
    capped = jnp.minimum(gathered.weights, 20.0)
    assert metrics["secure_capped_weights"] == float(np.sum(np.asarray(gathered.weights) > 20)) >= 2
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4),
        update,
        mean_of(gathered._replace(weights=capped, denominators=capped)),
    )


def test_aggregators_that_compare_updates_are_refused():
    for inner in (
        Aggregator(aggregate=lambda gathered, state, key: None),
        Aggregator(needs_reference=True),
        Aggregator(exports=lambda gathered, state: gathered),
    ):
        with pytest.raises(ValueError, match="sums alone"):
            secure(inner, CODEC, max_weight=1.0)
    with pytest.raises(ValueError, match="max_weight"):
        secure(None, CODEC, max_weight=0.0)


def clip_and_noise(limit):
    """An inner aggregator as of differential privacy; its state counts rounds, its "noise" is exactly that count."""

    def transform_update(update, state):
        norm = optax.tree.norm(update)
        clipped = jax.tree.map(lambda x: x * jnp.minimum(1.0, limit / norm), update)
        return clipped, {"clipped": jnp.float32(norm > limit)}

    def postprocess(mean, state, key):
        return jax.tree.map(lambda x: x + state, mean.update), state + 1.0, {"noise": state}

    return Aggregator(
        init=lambda template: jnp.float32(0.0),
        transform_update=transform_update,
        postprocess=postprocess,
        weighting=np.ones_like,
    )


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_round_over_devices_composes_with_clipping_and_noise_and_the_protocol_finds_the_same_sum(stochastic):
    codec = FixedPoint(clip=0.5, bits=10 if stochastic else 20, max_clients=16, stochastic=stochastic)
    rng = np.random.default_rng(0)
    optima = rng.normal(size=(11, 1, 1, 5)).astype(np.float32)
    weights, delivered = np.ones(11, np.float32), np.ones(11, bool)
    delivered[[1, 6]] = False
    aggregator = secure(clip_and_noise(0.5), codec, max_weight=1.0)
    assert aggregator.weighting is np.ones_like
    algorithm = fed_opt(
        jax.value_and_grad(lambda w, frozen, batch, key: 0.5 * jnp.sum((w["w"] - batch[0]) ** 2)),
        optax.sgd(1.0),
    )
    whole = make_round(algorithm, aggregator=aggregator)
    ids = np.arange(100, 111, dtype=np.int32)
    cohort = put_on_devices(Cohort(ids, np.where(delivered, weights, 0), optima, delivered=delivered))
    state = replicate(whole.init({"w": jnp.zeros(5, jnp.float32)}, 0))
    step = pmap_round(whole)
    want, totals = np.zeros(5), []
    for round in range(2):
        deltas = want - optima[delivered, 0, 0]  # one step of learning rate 1 takes a client to its optimum
        norms = np.linalg.norm(deltas, axis=1, keepdims=True)
        want = want - np.mean(deltas * np.minimum(1.0, 0.5 / norms), axis=0) - round
        state, metrics, report = step(state, (), cohort)
        np.testing.assert_allclose(state.params["w"], want, atol=(round + 1) * codec.step + 1e-5)
        assert metrics["noise"] == round and metrics["secure_clipped_share"] == 0
        np.testing.assert_allclose(metrics["clipped"], np.mean(norms > 0.5), rtol=1e-6)
        exported = jax.tree.map(lambda x: np.asarray(x)[0], report.exports)
        assert exported.vectors.shape == (16, 5 + codec.num_limbs) and list(exported.present[:11]) == list(delivered)
        result = run_on_host(exported, ids, codec, threshold=8, drop_after_masking=[104])
        assert set(ids) - set(result.survivors) == {101, 106}
        totals.append(result.total)
        broken = exported._replace(total=exported.total ^ np.uint32(1))
        with pytest.raises(RuntimeError, match="different sums"):
            run_on_host(broken, ids, codec, threshold=8)
        with pytest.raises(ProtocolError, match="threshold"):
            run_on_host(exported, ids, codec, threshold=10)
    assert state.aggregator.round == 2 and state.aggregator.inner == 2.0
    assert np.any(totals[0] != totals[1])
