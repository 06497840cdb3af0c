"""Every federation of a language model: it runs, and resumes to the same bits."""

import dataclasses

import numpy as np
import pytest

from fmfl_jax.experiment.build.federation import make_federation
from fmfl_jax.experiment.config.federation import DpConfig, FederationConfig
from fmfl_jax.experiment.config.server import ServerConfig
from fmfl_jax.experiment.methods.aggregators import AGGREGATORS, FLTrust, Median
from fmfl_jax.experiment.methods.algorithms import (
    ALGORITHMS,
    FedBuff,
    FedIt,
    FedProx,
    FedSaLora,
    FfaLora,
    FlexLora,
    Flora,
    HetLora,
)
from fmfl_jax.experiment.methods.attacks import Alie, Scaling
from fmfl_jax.experiment.methods.names import name_of
from fmfl_jax.experiment.methods.personalizations import PERSONALIZATIONS, Apfl, Ditto, FedRep
from fmfl_jax.experiment.methods.selections import Oort, Poisson
from fmfl_jax.fed.aggregators.robust import norm_bound
from fmfl_jax.fed.core.types import Execution
from tests.experiment.toys import (
    SIZES,
    assert_finite,
    assert_same_run,
    llama_rounds,
    llama_run,
    llama_settings,
    lossy,
    make_toy_job,
    whole_and_resumed,
)

DP = DpConfig(clip=0.1, noise_multiplier=1.0)


def label(f):
    own = "none" if f.personalization is None else name_of(f.personalization, PERSONALIZATIONS)
    parts = [name_of(f.algorithm, ALGORITHMS), own, *f.privacy, name_of(f.aggregator, AGGREGATORS)]
    return "-".join(parts)


@pytest.mark.parametrize(
    "federation",
    [
        FederationConfig(algorithm=FedBuff(buffer_size=2)),
        FederationConfig(algorithm=HetLora(), lora_ranks=(1, 2, 4)),
        FederationConfig(algorithm=Flora(), lora_ranks=(4, 2)),
        FederationConfig(algorithm=FlexLora(), lora_ranks=(2, 4)),
        FederationConfig(algorithm=FedSaLora()),
        FederationConfig(personalization=FedRep(1)),
        FederationConfig(personalization=Apfl("learned"), algorithm=FedProx(0.1)),
        FederationConfig(
            algorithm=FfaLora(),
            privacy=("dp", "secure"),
            dp=dataclasses.replace(DP, adaptive_quantile=0.5, noise_multiplier=0.3, cap=6.0),
            selection=Poisson(),
        ),
        FederationConfig(aggregator=FLTrust(), attack=Alie(1.5), selection=Oort()),
    ],
    ids=label,
)
def test_stopped_and_continued_is_bit_identical(federation, tmp_path):
    """With each algorithm's own state at the server, at the clients, in the aggregator and in the selector; those that
    know no LoRA go through the same loop in `test_cross_device.py`."""
    config = llama_settings(federation)
    whole, resumed = whole_and_resumed(lambda folder: llama_run(config, folder), tmp_path, step=2)
    assert_same_run(whole, resumed)
    assert_finite(whole.history)
    assert len({record["ppl"] for record in whole.history}) > 1  # something was learned


def test_secure_aggregation_is_the_plain_mean_and_its_protocol_agrees(tmp_path):
    """The real protocol runs on every round's integers; the model is FedAvg's to the step of the fixed point."""
    plain = llama_run(llama_settings(rounds=llama_rounds(2)), tmp_path / "plain")
    secure = llama_run(
        llama_settings(FederationConfig(privacy=("secure",)), rounds=llama_rounds(2)), tmp_path / "secure"
    )
    for name, value in plain.state.params.items():
        np.testing.assert_allclose(secure.state.params[name], value, atol=2e-5)
    assert all(record["secure_survivors"] == 4 and record["secure_bytes_up"] > 0 for record in secure.history[1:])


def test_exact_aggregations_report_no_bias_and_averaged_factors_do(tmp_path):
    fed_it = llama_run(llama_settings(FederationConfig(algorithm=FedIt(), aggregation_bias=True)), tmp_path / "fedit")
    flex = llama_run(llama_settings(FederationConfig(algorithm=FlexLora())), tmp_path / "flex")
    assert all(record["aggregation_bias"] > 1e-4 for record in fed_it.history[1:])
    # Four clients of rank 4 are cut to rank 4 together: what is lost is far less than the averaging's cross terms.
    assert flex.history[1]["aggregation_bias"] < 1.0


def test_clients_start_from_the_shared_model_and_leave_it(tmp_path):
    first, *_, last = llama_run(llama_settings(FederationConfig(personalization=Ditto(0.1))), tmp_path).history
    assert first["client_ppl_mean"] == pytest.approx(first["client_shared_ppl_mean"], rel=1e-7)
    assert abs(last["client_ppl_mean"] / last["client_shared_ppl_mean"] - 1) > 1e-6


def test_examples_privacy_counts_what_each_client_did(tmp_path):
    config = llama_settings(FederationConfig(privacy=("dp_sgd",), dp=dataclasses.replace(DP, noise_multiplier=4.0)))
    history = llama_run(config, tmp_path).history
    spent = [record["epsilon"] for record in history]
    assert spent[0] == 0 and np.all(np.diff(spent) >= 0) and 0 < spent[-1] < 10


def test_an_attacked_mean_is_moved_and_a_median_less(tmp_path):
    def moved(name, **options):
        result = llama_run(llama_settings(FederationConfig(**options), rounds=llama_rounds(1)), tmp_path / name)
        return {name: np.asarray(x) for name, x in result.state.params.items()}

    honest, attacked = moved("honest"), moved("attacked", attack=Scaling(1000.0))
    defended = moved("defended", aggregator=Median(), attack=Scaling(1000.0))
    distance = lambda a: sum(np.abs(a[name] - honest[name]).sum() for name in honest)
    assert distance(attacked) > 10 * distance(defended) > 0


@pytest.mark.parametrize("configured", ["aggregator", "network"])
def test_a_callers_aggregator_is_never_silently_replaced(configured):
    job = make_toy_job(lossy(), aggregation="over_the_air") if configured == "network" else None
    fed = FederationConfig(aggregator=Median()) if configured == "aggregator" else FederationConfig()
    with pytest.raises(ValueError, match=r"aggregator=\.\.\. and a network's aggregation=over_the_air"):
        make_federation(  # refused before the learner is looked at
            fed,
            llama_rounds(1),
            ServerConfig(),
            None,
            sizes=SIZES,
            execution=Execution(),
            job=job,
            aggregator=norm_bound(1.0),
        )
