"""Rounds over a network: ideal links, no links, unbiasedness, resuming, and the work that a model asks of a device."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmfl_jax.config import llama_preset
from fmfl_jax.experiment.config.case_study import AirConfig, make_uplink
from fmfl_jax.experiment.evaluation.perplexity import Evaluation
from fmfl_jax.experiment.loop.rounds import ClientData, Parts, RoundsConfig, run_rounds
from fmfl_jax.experiment.network import rounds as over_air
from fmfl_jax.experiment.network.rounds import Air
from fmfl_jax.experiment.network.workload import deal_devices, make_air, make_workload, multiplied_params
from fmfl_jax.experiment.plan import Job, abstract_params, abstract_trainable, plan_all, regime, table
from fmfl_jax.fed import selection
from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from fmfl_jax.fed.core.types import Delivery
from fmfl_jax.models.params import init_params, num_bytes
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.prompt import PromptConfig
from fmfl_jax.peft.split import FullConfig
from fmfl_jax.wireless import presets
from fmfl_jax.wireless.compute import training_flops_per_token

CLIENTS = 8


def toy_loss(params, frozen, windows, key):
    """The windows' mean is the optimum."""
    return jnp.mean(jnp.square(params["w"][None] - windows[:, :4].astype(jnp.float32)))


def toy_data():
    windows = np.random.default_rng(0).integers(0, 9, (64, 5)).astype(np.int32)
    return ClientData(windows, np.split(np.arange(64), [3, 10, 15, 30, 41, 50, 60]))


def toy_run(directory, num_rounds, air=None, uplink=None, selector=None, **settings):
    config = RoundsConfig(num_rounds=num_rounds, cohort_size=6, local_steps=2, batch_size=2, checkpoint_every=2)
    start = {"w": jnp.zeros(4, jnp.float32)}
    algorithm = fed_opt(
        jax.value_and_grad(toy_loss),
        optax.sgd(0.1),
        optax.sgd(1.0, momentum=0.5),
        delivery=Delivery(uplink=uplink, substitute_lost=air is not None and air.aggregation == "last_delta"),
    )

    def evaluate(params, frozen):
        return Evaluation(float(jnp.sum(params["w"])), 1.0, 1.0, 1)

    return run_rounds(
        config,
        algorithm,
        start,
        {"x": jnp.zeros(())},
        toy_data(),
        evaluate,
        directory=directory,
        parts=Parts(air=air, selector=selector),
        **settings,
    )


def make(network, *, bits=2e4, aggregation="survivors", able=None, rings=False):
    count = network.num_clients
    return Air(
        network=network,
        compute_s=np.full(count, 1e-3, np.float32),
        compute_j=np.full(count, 1e-4, np.float32),
        able=np.ones(count, bool) if able is None else able,
        uplink_bits=int(bits),
        downlink_bits=int(bits),
        base_bits=int(50 * bits),
        aggregation=aggregation,
        rings=rings,
    )


def lossy(**overrides):
    """Chen's one-packet links with a block for everybody, and interference that far clients drown in now and then."""
    return presets.chen(
        **{"num_clients": CLIENTS, "tx_power_dbm": 17.0, "energy_limit_j": 1.0, "block_interference_w": (2e-7,) * 12}
        | overrides
    )


def assert_finite(history):
    json.dumps(history, allow_nan=False)  # raises for NaN and infinity


@pytest.mark.parametrize("aggregation", ["survivors", "unbiased", "last_delta"])
def test_an_ideal_link_is_plain_fedavg_bit_for_bit(aggregation, tmp_path):
    plain = toy_run(tmp_path / "plain", 3)
    over = toy_run(tmp_path / "air", 3, make(presets.facts_20(num_clients=CLIENTS), aggregation=aggregation))
    jax.tree.map(np.testing.assert_array_equal, plain.state, over.state)
    for a, b in zip(plain.history[1:], over.history[1:]):
        assert a["loss"] == b["loss"] and b["participation"] == 1.0 and b["outage"] == 0.0
        assert b["uplink_bytes"] == 6 * 2e4 / 8 and b["energy_j"] > 0
    seconds = [record["seconds"] for record in over.history]
    assert seconds[0] == over.history[0]["base_delivery_s"] > 0 and np.all(np.diff(seconds) > 0)
    assert_finite(over.history)


@pytest.mark.parametrize("aggregation", ["survivors", "unbiased", "last_delta"])
def test_a_deadline_that_nobody_meets_leaves_the_model_as_it_was(aggregation, tmp_path):
    network = presets.facts_20(num_clients=CLIENTS, deadline_s=2e-3)
    result = toy_run(tmp_path, 2, make(network, bits=1e8, aggregation=aggregation))
    assert np.all(np.asarray(result.state.params["w"]) == 0)
    for record in result.history[1:]:
        assert record["delivered"] == 0 and record["outage"] == 1.0 and "loss" not in record
        assert record["latency_s"] == pytest.approx(2e-3)
    assert_finite(result.history)


def test_devices_that_are_too_small_are_not_selected(tmp_path):
    able = np.arange(CLIENTS) % 2 == 0
    result = toy_run(tmp_path, 3, make(presets.facts_20(num_clients=CLIENTS), able=able))
    assert any(record["cannot_hold"] > 0 for record in result.history[1:])
    for record in result.history[1:]:
        assert record["participation"] + record["cannot_hold"] == pytest.approx(1.0)
    assert not np.any(result.outcome.scheduled[~able])


def test_clients_out_of_reach_get_the_base_before_their_first_round_within_reach():
    """All clients walk: who holds no base takes no part, and every delivery costs time and bytes once."""
    network = presets.umi_20(
        num_clients=CLIENTS,
        mobility="random_waypoint",
        speed_mps=10.0,
        cell_radius_m=900.0,
        bs_power_dbm=20.0,
        max_uplink_s=5.0,
    )
    air = make(network, bits=2e6)
    state, ids = over_air.start(air, 3), np.arange(CLIENTS)
    held, first, reached = state.holds_base, state, state.base_reached
    assert 0 < reached == held.sum() < CLIENTS
    for r in range(15):
        state, outcome = over_air.play_round(
            air, state, round=r, seed=3, client_ids=ids, num_examples=np.ones(CLIENTS, np.float32)
        )
        assert not np.any(outcome.scheduled & ~state.holds_base) and np.all(held <= state.holds_base)
        assert (state.base_delivery_s > 0) == (state.base_reached > 0) == bool(np.any(held < state.holds_base))
        found = over_air.record(air, state, outcome, ids)
        assert found["base_downlink_bytes"] == state.base_reached * air.base_bits / 8
        held, reached = state.holds_base, reached + state.base_reached
    assert reached == held.sum() > first.holds_base.sum()


@pytest.mark.parametrize("mode", ["static", "slots"])
def test_of_an_upload_that_is_cut_off_only_what_was_sent_is_counted(mode):
    whole, cut = (
        make(
            presets.facts_20(num_clients=CLIENTS, scheduler="equal", wait_for=count, transfer_mode=mode),
            bits=1e6,
            rings=True,
        )
        for count in (None, 4)
    )
    sent = []
    for air in (whole, cut):
        state, outcome = over_air.play_round(
            air,
            over_air.start(air, 0),
            round=0,
            seed=0,
            client_ids=np.arange(CLIENTS),
            num_examples=np.ones(CLIENTS, np.float32),
        )
        sent.append(outcome)
    assert np.all(sent[0].delivered) and np.all(sent[0].uplink_bits == 1e6)
    lost = sent[1].scheduled & ~sent[1].delivered
    assert np.sum(lost) == 4 and np.all(sent[1].uplink_bits[~lost] == 1e6)
    share = sent[1].uplink_s / sent[0].uplink_s  # the same links, plan and fades
    np.testing.assert_allclose(sent[1].uplink_bits[lost], 1e6 * share[lost], rtol=1e-3)


def test_inverse_probability_weights_are_unbiased_and_the_survivors_mean_is_not():
    """Sum of weight x value over the normalizers, in 3000 rounds of lossy links, against the mean with everybody."""
    air = make(lossy(), aggregation="unbiased", rings=True)
    ids, examples = np.arange(CLIENTS), np.asarray([1, 2, 3, 4, 1, 2, 3, 4], np.float32)
    state = over_air.start(air, 0)
    values = np.arange(1, CLIENTS + 1) / CLIENTS  # the farther, the larger
    found, survivors = [], []
    for r in range(3000):
        state, outcome = over_air.play_round(air, state, round=r, seed=0, client_ids=ids, num_examples=examples)
        p = outcome.delivery_probability
        # Both rules of cohort_weights, written out.
        weights = np.where(outcome.delivered, examples / np.where(outcome.delivered, p, 1), 0)
        if r == 0:
            got, normalizers, heard = over_air.cohort_weights(air, outcome, ids, examples)
            np.testing.assert_allclose(got, weights, rtol=1e-6)
            np.testing.assert_array_equal(normalizers, examples)
            np.testing.assert_array_equal(heard, outcome.delivered)
        found.append(np.sum(weights * values) / examples.sum())
        heard = examples * outcome.delivered
        if heard.any():
            survivors.append(np.sum(heard * values) / heard.sum())
    target = np.sum(examples * values) / examples.sum()
    error = np.std(found) / math.sqrt(len(found))
    assert 0.2 < np.mean(p) < 0.95 and error < 0.1 * target
    assert abs(np.mean(found) - target) < 4 * error
    assert abs(np.mean(survivors) - target) > 10 * np.std(survivors) / math.sqrt(len(survivors))


@pytest.mark.parametrize(
    "spec, aggregation, selector",
    [
        (None, "unbiased", None),
        ("topk:0.5", "unbiased", None),
        (None, "last_delta", None),
        (None, "survivors", selection.oort(6, np.asarray([3, 7, 5, 15, 11, 9, 10, 4], np.float32))),
        (None, "survivors", selection.deadline_aware(6, 0.5)),
    ],
    ids=["unbiased", "topk", "last_delta", "oort", "deadline"],
)
def test_resumed_over_a_network_is_bit_identical(spec, aggregation, selector, tmp_path):
    air, uplink = make(lossy(mobility="gauss_markov", speed_mps=3.0), aggregation=aggregation), make_uplink(spec)
    whole = toy_run(tmp_path / "whole", 4, air, uplink, selector)
    toy_run(tmp_path / "parts", 2, air, uplink, selector)
    parts = toy_run(tmp_path / "parts", 4, air, uplink, selector)
    jax.tree.map(np.testing.assert_array_equal, whole.state, parts.state)
    timed = ("round_s", "tokens_per_s")
    assert [{k: v for k, v in r.items() if k not in timed} for r in whole.history] == [
        {k: v for k, v in r.items() if k not in timed} for r in parts.history
    ]
    assert any(record["participation"] < 1 for record in whole.history[1:])


def test_the_network_must_have_the_datas_clients(tmp_path):
    with pytest.raises(ValueError, match="the network has 20 clients, the data 8"):
        toy_run(tmp_path, 1, make(presets.facts_20()))


def test_the_timeline_adds_up_and_puts_the_slowest_first():
    air = make(presets.tran(num_clients=CLIENTS))  # TDMA: they wait for the channel
    _, outcome = over_air.play_round(
        air,
        over_air.start(air, 0),
        round=0,
        seed=0,
        client_ids=np.arange(CLIENTS),
        num_examples=np.ones(CLIENTS, np.float32),
    )
    found = over_air.timeline(air, outcome)
    total = sum(np.asarray(found[phase]) for phase in ("downlink", "compute", "wait", "uplink"))
    assert np.all(np.diff(total) <= 1e-6) and total[0] == pytest.approx(found["latency_s"], rel=1e-4)
    assert sorted(found["client_ids"]) == list(range(CLIENTS)) and max(found["wait"]) > 0


def test_the_workload_counts_the_actual_model():
    config = llama_preset("tiny")
    params = init_params(config, jax.random.key(0), dtype="float32")
    trainable = abstract_trainable(config, params, LoraConfig(rank=8, targets=("q_proj", "v_proj")))
    work = make_workload(config, params, trainable, LoraConfig(rank=8), batch_size=2, seq_len=32)
    # 2 layers of q, k, v, o, gate, up, down at 64 / 192 with half the heads for k and v; the tied head of 256
    matrices = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 192 * 3)
    assert multiplied_params(config) == work.base_params == matrices + 256 * 64
    assert work.trainable_params == 2 * 8 * (64 + 64 + 64 + 32) and work.weight_bytes == num_bytes(params)
    attention = 3 * 2 * 2 * 64 * 32  # three passes' worth of 2 L N H keys
    assert training_flops_per_token(work) == 4 * work.base_params + 6 * work.trainable_params + attention
    full = make_workload(config, params, params, FullConfig(), batch_size=2, seq_len=32)
    assert training_flops_per_token(full) == 6 * full.base_params + attention
    again = make_workload(config, params, trainable, LoraConfig(), batch_size=2, seq_len=32, remat=True)
    assert again.activation_bytes < work.activation_bytes


def test_seven_billion_fit_a_phone_in_int4_only():
    """The paper's point: 13.6 GB of fp16 weights against 3.7 GB, for a device with 8 GB."""
    config, peft = llama_preset("7b", dtype="float16"), PromptConfig(num_tokens=4)
    able, bits = {}, {}
    for form in ("fp16", "int4"):
        params = abstract_params(config, form)
        air = make_air(
            AirConfig(network="facts_20", devices=("phone", "edge_box")),
            config,
            params,
            abstract_trainable(config, params, peft),
            peft,
            num_clients=4,
            local_steps=1,
            batch_size=1,
            seq_len=64,
            uplink_bits=4 * 4096 * 32,
            downlink_bits=4 * 4096 * 32,
        )
        able[form], bits[form] = air.able.tolist(), air.base_bits
        assert air.compute_s[1] < air.compute_s[0]
    assert able == {"fp16": [False, True, False, True], "int4": [True] * 4}
    assert bits["fp16"] / 8 == pytest.approx(2 * 6.738e9, rel=1e-3) and bits["int4"] < 0.3 * bits["fp16"]


def test_a_plan_names_what_decides():
    config = llama_preset("tiny", dtype="float16")
    airs = [
        AirConfig(network="facts_20", devices=("phone",)),
        AirConfig(network="facts_20", devices=("phone",), deadline_s=1e-5),
    ]
    rows = plan_all(
        config,
        {"lora": LoraConfig(), "full": FullConfig()},
        ["fp16", "int4"],
        airs,
        Job(1, 1, 16),
        num_clients=4,
        num_rounds=2,
        group_size=32,
    )
    assert len(rows) == 2 * 2 + 2  # no full fine-tuning of int4
    assert rows[0]["dominates"] == "uplink" and rows[0]["outage"] == 0 and rows[0]["round_s"] > 0
    assert regime(rows[1]) == "nobody is heard" and rows[1]["round_s"] == pytest.approx(1e-5)
    by_form = {row["weights"]: row for row in rows if row["peft"] == "lora"}
    assert by_form["int4"]["weight_bytes"] < by_form["fp16"]["weight_bytes"]
    assert_finite(rows)
    assert len(table(rows).splitlines()) == 2 + len(rows)


@pytest.mark.parametrize(
    "make_it, expected",
    [
        (lambda: AirConfig(network="umi"), "--network=umi: expected none or one of umi_20"),
        (lambda: AirConfig(network="umi_20", deadline_s=0.0), "deadline_s must be above 0"),
        (lambda: make_uplink("topk"), "--uplink=topk: expected identity"),
        (lambda: make_uplink("zip:3"), "--uplink=zip:3: expected identity"),
        (lambda: make_uplink("topk:2"), "fraction must be in"),
        (lambda: deal_devices(("phone", "fridge"), 3), "--device=phone,fridge: expected some of phone"),
    ],
)
def test_mistakes_are_named(make_it, expected):
    with pytest.raises(ValueError) as error:
        make_it()
    assert expected in str(error.value)
