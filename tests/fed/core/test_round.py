"""A round is the same on any number of devices and in any order of its clients, whatever the algorithm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmfl_jax.experiment.network.aircomp import over_the_air
from fmfl_jax.fed import attacks
from fmfl_jax.fed.aggregators import robust
from fmfl_jax.fed.aggregators.dp_fedavg import AdaptiveClipping, dp_fedavg
from fmfl_jax.fed.aggregators.secure import secure
from fmfl_jax.fed.algorithms.apfl import apfl
from fmfl_jax.fed.algorithms.ditto import ditto
from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from fmfl_jax.fed.algorithms.scaffold import scaffold
from fmfl_jax.fed.core.cohort import lay_out, without_padding
from fmfl_jax.fed.core.round import Transport, make_round
from fmfl_jax.fed.core.types import Cohort
from fmfl_jax.fed.secure.fixed_point import FixedPoint
from fmfl_jax.parallel import AXIS
from fmfl_jax.transport.quantize import qsgd
from fmfl_jax.transport.sparsify import top_k
from tests.fed import quadratics

N = 11
SGD, SERVER = optax.sgd(0.1), optax.sgd(1.0, momentum=0.5)


def plain(**parts):
    return make_round(fed_opt(quadratics.grad_fn, SGD, SERVER), **parts)


ROUNDS = {
    "qsgd": plain(transport=Transport(codec=qsgd(4))),
    "error_feedback": plain(transport=Transport(codec=top_k(0.5))),
    "median": plain(aggregator=robust.median()),
    "krum": plain(aggregator=robust.krum(0.2)),
    "geometric_median": plain(aggregator=robust.geometric_median()),
    "noise_attack": plain(attack=attacks.gaussian(0.3)),
    "dp": plain(
        aggregator=dp_fedavg(
            clip_norm=0.1, noise_multiplier=0.2, expected_cohort=N, adaptive=AdaptiveClipping(quantile=0.5)
        )
    ),
    "secure": plain(
        aggregator=secure(
            None,
            FixedPoint(clip=4.0, bits=20, max_clients=16, stochastic=False),
            max_weight=5.0,
            seed=0,
        )
    ),
    "over_the_air": plain(aggregator=over_the_air(truncated=True)),
    "scaffold": make_round(scaffold(quadratics.grad_fn, 0.1, SERVER, num_clients=N)),
    "ditto": make_round(ditto(quadratics.grad_fn, SGD, SERVER, strength=0.3)),
    "apfl": make_round(apfl(quadratics.grad_fn, SGD, SERVER, alpha=0.5, alpha_learning_rate=0.1)),
}


def play(whole, *, num_devices, order):
    """(parameters, clients' states in the order of their numbers, losses) after two rounds."""
    _, _, batches = quadratics.objectives(N, steps=3)
    weights = np.linspace(1, 3, N, dtype=np.float32)
    params, states = quadratics.start(), ()
    if whole.keeps_client_states:
        states = quadratics.first_states(whole, params, N)
    step = jax.pmap(
        whole.spmd,
        axis_name=AXIS,
        in_axes=(None, None, 0),
        out_axes=(None, None, 0),
        devices=jax.devices()[:num_devices],
    )
    state, losses = whole.init(params, 7), []
    for _ in range(2):
        cohort = Cohort(
            order,
            weights[order],
            batches[order],
            client_states=jax.tree.map(lambda x: x[order], states),
            delivered=order != 4,
            extras={"malicious": order % 5 == 0, "snr": np.float32(3) + order},
        )
        state, metrics, report = step(state, jnp.zeros(()), lay_out(cohort, num_devices=num_devices))
        for kept, new in zip(jax.tree.leaves(states), jax.tree.leaves(without_padding(report.states, N))):
            kept[order] = new
        losses.append(metrics["loss"])
    return jax.device_get((state.params, states, losses))


@pytest.mark.parametrize("name", ROUNDS)
def test_neither_devices_nor_order_matter(name):
    order = np.arange(N, dtype=np.int32)
    expected = play(ROUNDS[name], num_devices=1, order=order)
    result = play(ROUNDS[name], num_devices=8, order=order[::-1].copy())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), result, expected)
    assert np.abs(expected[0]["w"] - np.asarray(quadratics.start()["w"])).max() > 1e-3


def test_a_reference_of_clients_with_a_state_is_refused():
    with pytest.raises(ValueError, match="keep a state"):
        make_round(ditto(quadratics.grad_fn, SGD, strength=0.3), aggregator=robust.fltrust())
