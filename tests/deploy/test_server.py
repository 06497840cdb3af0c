"""Rounds whose clients stand on nodes against the simulator's, and what goes wrong between them."""

import jax
import numpy as np
import pytest

from fmfl_jax.experiment.config.cross_device import CrossDeviceConfig
from fmfl_jax.experiment.config.federation import DpConfig, FederationConfig
from fmfl_jax.experiment.config.server import ServerConfig
from fmfl_jax.experiment.cross_device import run_cross_device
from fmfl_jax.experiment.methods.aggregators import Median
from fmfl_jax.experiment.methods.algorithms import Scaffold
from fmfl_jax.experiment.methods.codecs import TopK
from fmfl_jax.experiment.methods.selections import Poisson
from tests.deploy.links import nearby
from tests.experiment.toys import small_task

FED_ADAM = ServerConfig(optimizer="fedadam", learning_rate=0.01)
DP = FederationConfig(privacy=("dp",), dp=DpConfig(clip=0.1, noise_multiplier=0.5), selection=Poisson())


def small_run(directory, elsewhere=None, *, num_rounds=3, federation=FederationConfig(), **settings):
    config = CrossDeviceConfig(
        num_rounds=num_rounds, cohort_size=4, seed=5, eval_every=1, federation=federation, **settings
    )
    return run_cross_device(config, *small_task(6), directory, elsewhere=elsewhere)


def assert_close(a, b):
    """Parameters, server optimizer and the like, to 1e-6; losses too."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6, rtol=1e-6), a.state._asdict(), b.state._asdict()
    )
    names = ("loss", "counted_clients", "payload_bits", "uplink_bytes")
    for x, y in zip(a.history[1:], b.history[1:], strict=True):
        assert x["clients"] == y["clients"]
        for name in names:
            assert (name in x) == (name in y), name
            np.testing.assert_allclose(x.get(name, 0), y.get(name, 0), rtol=2e-5 if "b" in name else 1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"server": FED_ADAM},
        {"federation": FederationConfig(algorithm=Scaffold())},
        {"federation": FederationConfig(aggregator=Median(), uplink=TopK(0.2))},
        {"federation": DP},
    ],
    ids=["fedavg", "fedadam", "scaffold", "median-topk", "dp"],
)
def test_small_models_end_as_in_the_simulator(settings, tmp_path, only_devices):
    only_devices(1)
    here = small_run(tmp_path / "here", **settings)
    there = small_run(tmp_path / "there", nearby(tmp_path / "nodes"), **settings)
    assert_close(here, there)
    assert all(record["silent"] == [] and record["dropped"] == {} for record in there.history[1:])
