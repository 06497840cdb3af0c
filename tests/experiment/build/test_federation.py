"""Every federation that flags can name: it runs, resumes to the same bits, and what makes no sense is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from fmfl_jax.config import llama_preset
from fmfl_jax.experiment.build.federation import make_federation
from fmfl_jax.experiment.config.case_study import (
    AirConfig,
    CaseStudyConfig,
    PartitionConfig,
    ServerConfig,
    TextConfig,
    Tuning,
)
from fmfl_jax.experiment.config.federation import DpConfig, FederationConfig
from fmfl_jax.experiment.evaluation.per_client import hold_out, summary
from fmfl_jax.experiment.evaluation.perplexity import Evaluation
from fmfl_jax.experiment.loop.rounds import ClientData, RoundsConfig, run_rounds
from fmfl_jax.experiment.pretrain import PretrainConfig
from fmfl_jax.models.params import init_params
from fmfl_jax.peft.adapter import AdapterConfig
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.split import split
from fmfl_jax.quant.awq import QuantConfig

MODEL = llama_preset("tiny", num_layers=2, embed_dim=16, hidden_dim=32, num_heads=2, num_kv_heads=1)
DP = DpConfig(clip=0.1, noise_multiplier=1.0)
CLIENTS = 9


def settings(
    federation=FederationConfig(),
    *,
    peft=LoraConfig(rank=4, targets=("q_proj",)),
    weights=("fp",),
    num_rounds=3,
    **more,
):
    return CaseStudyConfig(
        checkpoint=None,
        tokenizer=None,
        model=MODEL,
        dtype="float32",
        text=TextConfig(),
        pretrain=PretrainConfig(num_steps=1, batch_size=1, learning_rate=1e-3),
        partition=PartitionConfig(num_clients=CLIENTS),
        quant=QuantConfig(group_size=16),
        weights=weights,
        rounds=RoundsConfig(
            num_rounds=num_rounds, cohort_size=4, local_steps=2, batch_size=2, checkpoint_every=2, clients_per_pass=1
        ),
        tunings={"it": Tuning(peft=peft, learning_rate=1e-2)},
        federation=federation,
        **({"server": ServerConfig()} | more),
    )


def windows():
    rng = np.random.default_rng(0)
    indices = np.split(rng.permutation(60), [3, 8, 15, 20, 28, 36, 44, 50])
    return ClientData(rng.integers(0, 256, (60, 9)).astype(np.int32), indices)


def run(config, directory):
    (tuning,) = config.tunings.values()
    model = split(MODEL, init_params(MODEL, jax.random.key(0)), tuning.peft, key=jax.random.key(1))
    federation = make_federation(config, tuning, model, MODEL, windows(), root=windows().windows[:8])

    def evaluate(params, frozen):
        return Evaluation(sum(float(np.abs(x).sum()) for x in params.values()), 0.0, 0.0, 1)

    return run_rounds(
        config.rounds,
        federation.algorithm,
        federation.trainable,
        federation.frozen,
        federation.data,
        evaluate,
        directory=directory,
        parts=federation.parts,
    )


def timeless(history):
    timed = ("round_s", "tokens_per_s", "secure_protocol_s")
    return [{k: v for k, v in record.items() if k not in timed} for record in history]


@pytest.mark.parametrize(
    "federation",
    [
        FederationConfig(algorithm="scaffold"),
        FederationConfig(algorithm="fedbuff", buffer_size=2),
        FederationConfig(algorithm="hetlora", ranks=(1, 2, 4)),
        FederationConfig(algorithm="flora", ranks=(4, 2)),
        FederationConfig(algorithm="flexlora", ranks=(2, 4)),
        FederationConfig(algorithm="fedsa_lora"),
        FederationConfig(personalization="fedrep:1"),
        FederationConfig(personalization="ditto:0.1"),
        FederationConfig(personalization="apfl:learned", algorithm="fedprox", proximal=0.1),
        FederationConfig(
            algorithm="ffa_lora",
            privacy=("dp", "secure"),
            dp=dataclasses.replace(DP, adaptive_quantile=0.5, noise_multiplier=0.3),
            selection="poisson",
        ),
        FederationConfig(privacy=("dp",), dp=dataclasses.replace(DP, cap=6.0), selection="poisson"),
        FederationConfig(aggregator="fltrust", attack="alie:1.5", selection="oort"),
    ],
    ids=lambda f: f"{f.algorithm}-{f.personalization}-{'-'.join(f.privacy)}-{f.aggregator}",
)
def test_stopped_and_continued_is_bit_identical(federation, tmp_path):
    """With each algorithm's own state at the server, at the clients, in the aggregator and in the selector."""
    config = settings(federation)
    whole = run(config, tmp_path / "whole")
    run(dataclasses.replace(config, rounds=dataclasses.replace(config.rounds, num_rounds=2)), tmp_path / "parts")
    parts = run(config, tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, whole.state, parts.state)
    assert timeless(whole.history) == timeless(parts.history)
    json.dumps(whole.history, allow_nan=False)
    assert len({record["ppl"] for record in whole.history}) > 1  # something was learned


def test_secure_aggregation_is_the_plain_mean_and_its_protocol_agrees(tmp_path):
    """The real protocol runs on every round's integers; the model is FedAvg's to the step of the fixed point."""
    plain = run(settings(num_rounds=2), tmp_path / "plain")
    secure = run(settings(FederationConfig(privacy=("secure",)), num_rounds=2), tmp_path / "secure")
    for name, value in plain.state.params.items():
        np.testing.assert_allclose(secure.state.params[name], value, atol=2e-5)
    assert all(record["secure_survivors"] == 4 and record["secure_bytes_up"] > 0 for record in secure.history[1:])


def test_exact_aggregations_report_no_bias_and_averaged_factors_do(tmp_path):
    fed_it = run(settings(FederationConfig(algorithm="fedit", aggregation_bias=True)), tmp_path / "fedit")
    flex = run(settings(FederationConfig(algorithm="flexlora")), tmp_path / "flex")
    assert all(record["aggregation_bias"] > 1e-4 for record in fed_it.history[1:])
    # Four clients of rank 4 are cut to rank 4 together: what is lost is far less than the averaging's cross terms.
    assert flex.history[1]["aggregation_bias"] < 1.0


def test_clients_start_from_the_shared_model_and_leave_it(tmp_path):
    first, *_, last = run(settings(FederationConfig(personalization="ditto:0.1")), tmp_path).history
    assert first["client_ppl_mean"] == pytest.approx(first["client_shared_ppl_mean"], rel=1e-7)
    assert abs(last["client_ppl_mean"] / last["client_shared_ppl_mean"] - 1) > 1e-6


def test_examples_privacy_counts_what_each_client_did(tmp_path):
    config = settings(FederationConfig(privacy=("dp_sgd",), dp=dataclasses.replace(DP, noise_multiplier=4.0)))
    history = run(config, tmp_path).history
    spent = [record["epsilon"] for record in history]
    assert spent[0] == 0 and np.all(np.diff(spent) >= 0) and 0 < spent[-1] < 10


def test_an_attacked_mean_is_moved_and_a_median_less(tmp_path):
    def moved(**options):
        directory = tmp_path / "-".join(options.values()).replace(":", "")
        result = run(settings(FederationConfig(**options), num_rounds=1), directory)
        return {name: np.asarray(x) for name, x in result.state.params.items()}

    honest, attacked = moved(aggregator="mean"), moved(aggregator="mean", attack="scale:1000")
    defended = moved(aggregator="median", attack="scale:1000")
    distance = lambda a: sum(np.abs(a[name] - honest[name]).sum() for name in honest)
    assert distance(attacked) > 10 * distance(defended) > 0


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(privacy=("secure",), aggregator="krum"), "the server sees only the sum"),
        (dict(privacy=("secure",), algorithm="flora"), "needs each client's factors"),
        (dict(privacy=("dp",), dp=DP, weighting="examples", selection="poisson"), "needs uniform weights"),
        (dict(privacy=("dp",), dp=DP), "holds for Poisson sampling"),
        (dict(privacy=("dp_sgd",), dp=dataclasses.replace(DP, cap=3.0)), "belongs to --privacy=dp"),
        (
            dict(privacy=("dp",), dp=DP, selection="poisson", aggregator="median"),
            "calibrated to the sensitivity of a mean",
        ),
        (dict(algorithm="scaffold", client_optimizer="adamw"), "assume plain SGD steps"),
        (dict(algorithm="fedprox"), "takes a --proximal above 0"),
        (dict(algorithm="fedsa_lora", personalization="ditto:1"), "goes with fedavg"),
        (dict(personalization="dito:1"), "--personalization=dito: expected one of none, ditto"),
        (dict(aggregator="norm_bound"), "--aggregator=norm_bound: expected norm_bound:NUMBER"),
        (dict(personalization="fedper:5"), "expected some, and not all"),
        (dict(algorithm="fedavg", ranks=(1, 2)), "cannot average factors of different ranks"),
    ],
)
def test_what_makes_no_sense_is_refused(options, expected, tmp_path):
    with pytest.raises(ValueError) as error:
        run(settings(FederationConfig(**options)), tmp_path)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "federation, more, expected",
    [
        (FederationConfig(algorithm="flora"), dict(weights=("awq",)), "which 4 bits cannot hold"),
        (FederationConfig(algorithm="flora"), dict(server=ServerConfig(optimizer="fedadam")), "no coordinates"),
        (FederationConfig(algorithm="hetlora"), dict(peft=AdapterConfig()), "needs --peft=lora"),
        (FederationConfig(selection="deadline"), {}, "needs a --network and a --deadline_s"),
        (
            FederationConfig(aggregator="median"),
            dict(air=AirConfig(network="chen", aggregation="over_the_air")),
            "it is itself how messages are joined",
        ),
    ],
)
def test_what_does_not_fit_the_model_or_the_air_is_refused(federation, more, expected):
    with pytest.raises(ValueError) as error:
        settings(federation, **more)
    assert expected in str(error.value)


def test_held_out_windows_are_nobodys_training_windows():
    train, held = hold_out(windows(), 0.2, most=3, seed=0)
    for before, kept, out in zip(windows().client_indices, train.client_indices, held.client_indices):
        assert sorted([*kept, *out]) == sorted(before) and 1 <= len(out) <= 3 and len(kept)
    found = summary(np.log(np.arange(1, 21)))
    assert found["client_ppl_mean"] == pytest.approx(10.5) and found["client_ppl_worst_decile"] == pytest.approx(19.5)
