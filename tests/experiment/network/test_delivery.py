"""The base model's delivery over the radio: what each way saves, and that a run goes by what it says."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from fmfl_jax.experiment.config.network import NetworkConfig
from fmfl_jax.experiment.network import rounds
from fmfl_jax.experiment.network.delivery import coded_stage_bits, delivery_s, make_delivery
from fmfl_jax.experiment.report.delivery import delivery_rows, delivery_table
from fmfl_jax.transport.weights.coders import encode
from fmfl_jax.wireless import network, presets
from tests.experiment.toys import CLIENTS, make_toy_job


def params_of(tied=True):
    rng = np.random.default_rng(0)
    draw = lambda *shape: (0.02 * rng.normal(size=shape)).astype(ml_dtypes.bfloat16)
    names = {"embed_tokens.weight": (200, 32), "layers.0.a": (32, 64), "layers.1.a": (32, 64), "norm.weight": (32,)}
    if not tied:
        names["lm_head.weight"] = (32, 200)
    return {name: draw(*shape) for name, shape in names.items()}


FORWARD_S = np.full(CLIENTS, 0.5)


@pytest.mark.parametrize("tied", [True, False])
def test_stages_of_bits_and_of_work(tied):
    params = params_of(tied)
    plain = make_delivery(params, ("arq",), forward_s=FORWARD_S)
    head = 0 if tied else 32 * 200
    assert plain.stage_bits.tolist() == [16 * n for n in (6400, 2048, 2048, 32 + head)]
    total = 6400 + 2 * 2048 + 32
    np.testing.assert_allclose(plain.stage_share, np.asarray([0, 2048, 2048, 32 + 6400]) / total)
    coded = make_delivery(params, ("coded", "fountain"), forward_s=FORWARD_S)
    layer = encode(params["layers.0.a"].tobytes(), "BF16")[1]
    assert coded.stage_bits[1] == 8 * len(layer) and coded.bits < 0.75 * plain.bits
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    np.testing.assert_array_equal(coded_stage_bits(shapes), plain.stage_bits)


def test_every_step_saves_time():
    """Losses are repaired, so nobody is out of reach who was in it; a first forward pass overlaps as in the closed
    form."""
    config, params = presets.umi_20(num_clients=CLIENTS), params_of()
    state = network.init_network(config, jax.random.key(2))
    chosen = np.arange(CLIENTS) != 1
    ways = (("arq",), ("fountain",), ("coded", "fountain"), ("coded", "fountain", "progressive"))
    slow = lambda way: dataclasses.replace(
        (d := make_delivery(params, way, forward_s=1e-2 * np.arange(CLIENTS))), stage_bits=d.stage_bits * 1000
    )
    times = [delivery_s(config, state, slow(way), chosen) for way in ways]
    assert all(np.all(t[1] == 0) and np.all(np.isfinite(t)) for t in times)
    arq, fountain, coded, progressive = (t[chosen] for t in times)
    assert np.all(arq > fountain) and np.all(fountain > coded)
    saved = coded - progressive
    forward = 1e-2 * np.arange(CLIENTS)[chosen]
    share = make_delivery(params, ("arq",), forward_s=FORWARD_S).stage_share
    np.testing.assert_allclose(saved, forward * share[:-1].sum(), rtol=1e-9, atol=1e-12)  # all but the last stage


def test_a_job_counts_the_seconds_and_bytes_of_its_delivery():
    params = params_of()
    job = make_toy_job(presets.umi_20(num_clients=CLIENTS))
    delivery = make_delivery(params, ("coded", "fountain"), forward_s=FORWARD_S)
    job = dataclasses.replace(job, delivery=delivery, base_bits=delivery.bits)
    table = {row["delivery"]: row for row in delivery_rows(job, params, seed=4)}
    state = rounds.start(job, 4)
    row = table["coded,fountain"]
    assert (row["base_delivery_s"], row["base_bytes"]) == (state.base_delivery_s, delivery.bits / 8)
    assert state.seconds == state.base_delivery_s > 0 and np.all(state.holds_base)
    assert (
        table["no fading"]["base_delivery_s"] < table["fountain"]["base_delivery_s"] < table["arq"]["base_delivery_s"]
    )
    text = delivery_table(list(table.values())).splitlines()
    assert len(text) == 7 and text[2].split()[0] == "arq" and text[2].split()[3] == "1.000"


def test_refused_deliveries():
    for bad in (("arq", "fountain"), ("coded", "coded"), ("pigeons",)):
        with pytest.raises(ValueError, match=f"delivery={','.join(bad)}: expected some of arq, coded"):
            NetworkConfig(network="umi_20", delivery=bad)
