"""What a federation cannot be made of is refused with the reason, the fields as name=value."""

import dataclasses

import numpy as np
import pytest

from fmfl_jax.experiment.config.cross_device import CrossDeviceConfig, TaskConfig
from fmfl_jax.experiment.config.federation import DpConfig, FederationConfig
from fmfl_jax.experiment.config.network import NetworkConfig
from fmfl_jax.experiment.config.server import ServerConfig
from fmfl_jax.experiment.methods.aggregators import FLTrust, Krum, Median
from fmfl_jax.experiment.methods.algorithms import FedBuff, FedProx, FedSaLora, FlexLora, Flora, HetLora, Scaffold
from fmfl_jax.experiment.methods.attacks import SignFlip
from fmfl_jax.experiment.methods.codecs import TopK
from fmfl_jax.experiment.methods.personalizations import Ditto, FedPer, PrivateLora
from fmfl_jax.experiment.methods.selections import Deadline, Oort, Poisson, SelectionInputs, Uniform
from fmfl_jax.peft.adapter import AdapterConfig
from tests.experiment.toys import llama_run, llama_settings

DP = DpConfig(clip=0.1, noise_multiplier=1.0)
OVER_THE_AIR = NetworkConfig(network="chen", aggregation="over_the_air")


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(privacy=("secure",), aggregator=Krum()), "secure aggregation with aggregator=krum: the server sees only"),
        (dict(privacy=("secure",), algorithm=Flora()), "algorithm=flora: its server needs each client's factors"),
        (dict(privacy=("secure",), algorithm=FedBuff()), "masks cancel within one cohort"),
        (dict(privacy=("secret",)), "privacy=secret: expected some of dp, dp_sgd, secure"),
        (dict(privacy=("dp",), dp=DP, weighting="examples", selection=Poisson()), "needs uniform weights"),
        (dict(privacy=("dp",), dp=DP), "privacy=dp with selection=uniform: the accounting holds for Poisson sampling"),
        (dict(privacy=("dp",), selection=Poisson()), "belong to privacy=dp or privacy=dp_sgd"),
        (dict(dp=DP), "belong to privacy=dp or privacy=dp_sgd"),
        (dict(privacy=("dp", "dp_sgd"), dp=DP, selection=Poisson()), "choose one, the noise would be added twice"),
        (dict(privacy=("dp_sgd",), dp=dataclasses.replace(DP, cap=3.0)), "dp_cap belongs to privacy=dp"),
        (dict(privacy=("dp",), dp=DP, selection=Poisson(), aggregator=Median()), "calibrated to the sensitivity of a"),
        (dict(privacy=("dp",), dp=DP, selection=Poisson(), algorithm=Scaffold()), "more than one clipped delta"),
        (dict(algorithm=Scaffold(), client_optimizer="adamw"), "assume plain SGD steps"),
        (dict(algorithm=Scaffold(), aggregator=Median()), "the algorithm defines how updates are joined"),
        (dict(algorithm=FedBuff(), selection=Oort()), "there are no cohorts"),
        (dict(algorithm=FedSaLora(), personalization=Ditto(1.0)), "goes with fedavg"),
        (dict(algorithm=FedProx(0.1), personalization=FedPer(1)), "pull at private parameters too"),
        (dict(algorithm=Flora(), attack=SignFlip()), "a flipped B cancel"),
        (dict(algorithm=FlexLora(), uplink=TopK(0.5)), "uplink=topk with algorithm=flexlora"),
        (dict(aggregation_bias=True), "aggregation_bias goes with algorithm=fedit"),
        (dict(aggregator=FLTrust(), personalization=Ditto(1.0)), "has no client's state"),
        (dict(lora_ranks=(1, 2)), "factors of different ranks cannot be averaged by algorithm=fedavg"),
        (dict(weighting="size"), "weighting=size: expected examples or uniform"),
        (dict(client_optimizer="lion"), "client_optimizer=lion: expected adamw or sgd"),
        (dict(attack_fraction=1.0), "attack_fraction=1.0: expected a share"),
    ],
)
def test_what_makes_no_sense_is_refused(options, expected):
    with pytest.raises(ValueError) as error:
        FederationConfig(**options)
    assert expected in str(error.value) and "--" not in str(error.value)


@pytest.mark.parametrize(
    "federation, more, expected",
    [
        (FederationConfig(algorithm=Flora()), dict(weights=("awq",)), "which 4 bits cannot hold"),
        (FederationConfig(algorithm=Flora()), dict(server=ServerConfig(optimizer="fedadam")), "no coordinates"),
        (FederationConfig(algorithm=HetLora()), dict(peft=AdapterConfig()), "algorithm=hetlora needs peft=lora"),
        (FederationConfig(personalization=PrivateLora(1)), dict(peft=AdapterConfig()), "private ranks needs peft=lora"),
        (FederationConfig(algorithm=HetLora(), lora_ranks=(1, 8)), {}, "lora_ranks=1,8: the model's rank is 4"),
        (FederationConfig(selection=Deadline()), {}, "selection=deadline needs a network and a deadline_s"),
        (FederationConfig(aggregator=Median()), dict(network=OVER_THE_AIR), "it is itself how updates are joined"),
        (FederationConfig(uplink=TopK(0.5)), dict(network=OVER_THE_AIR), "analog symbols are sent as they are"),
        (FederationConfig(privacy=("secure",)), dict(network=OVER_THE_AIR), "needs the plain sum"),
    ],
)
def test_what_does_not_fit_the_model_or_the_network_is_refused(federation, more, expected):
    with pytest.raises(ValueError) as error:
        llama_settings(federation, **more)
    assert expected in str(error.value) and "--" not in str(error.value)


def test_more_kept_layers_than_the_model_has_are_refused_by_the_model(tmp_path):
    with pytest.raises(ValueError, match="5 layers keep 2 of 4 trained arrays|expected some, and not all"):
        llama_run(llama_settings(FederationConfig(personalization=FedPer(5))), tmp_path)


def test_selection_by_deadline_needs_one():
    with pytest.raises(ValueError, match="needs a network with a deadline"):
        Deadline().make(SelectionInputs(2, np.ones(4), None))


def federated(**options):
    return CrossDeviceConfig(federation=FederationConfig(**options))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TaskConfig(name="agnews"), "needs train_text and test_text"),
        (lambda: TaskConfig(train_text="x"), "train_text is for task agnews"),
        (lambda: TaskConfig(alpha=0.0), "alpha must be above 0"),
        (lambda: federated(algorithm=HetLora()), "algorithm=hetlora is of LoRA factors"),
        (lambda: federated(personalization=PrivateLora(1)), "is of LoRA factors"),
        (lambda: federated(aggregator=FLTrust()), "compares with the server's data"),
        (lambda: federated(privacy=("dp_sgd",), dp=DP), "privacy=dp_sgd is for language models"),
        (lambda: federated(client_optimizer="adamw"), "client_optimizer=adamw is for language models"),
        (lambda: federated(selection=Deadline()), "needs a network and a deadline_s"),
        (
            lambda: CrossDeviceConfig(network=OVER_THE_AIR, federation=FederationConfig(aggregator=Median())),
            "itself how updates are joined",
        ),
        (
            lambda: CrossDeviceConfig(network=NetworkConfig(network="chen", delivery=("coded",))),
            "delivery=coded is of a base model, which a cross-device run has none of",
        ),
        (lambda: CrossDeviceConfig(client_lr=0.0), "must be above 0"),
        (lambda: CrossDeviceConfig(local_epochs=0), "local_epochs must be at least 1"),
        (lambda: CrossDeviceConfig(execution="fast"), "expected one of auto, vmap, scan, steps"),
    ],
)
def test_settings_that_small_models_cannot_serve_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_defaults_that_follow_from_the_methods():
    assert FederationConfig(algorithm=FedBuff()).uniform_weights and not FederationConfig().uniform_weights
    assert (
        FederationConfig(algorithm=FedSaLora()).keeps_personal_models and not FederationConfig().keeps_personal_models
    )
    assert FederationConfig(algorithm=FedProx(0.3)).proximal == 0.3 and FederationConfig().proximal == 0.0
    assert FederationConfig().selection == Uniform()
