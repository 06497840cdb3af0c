"""Every name that a configuration may have makes something of its kind; wrong ones are refused, by their field."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmfl_jax.experiment.methods.aggregators import AGGREGATORS
from fmfl_jax.experiment.methods.algorithms import ALGORITHMS, FedBuff, HetLora, Parts
from fmfl_jax.experiment.methods.attacks import ATTACKS, Alie
from fmfl_jax.experiment.methods.codecs import CODECS, Qsgd, TopK
from fmfl_jax.experiment.methods.contributions import CONTRIBUTIONS, ComFedSV
from fmfl_jax.experiment.methods.incentives import INCENTIVES, Auction, Contract, MarketInputs, Stackelberg
from fmfl_jax.experiment.methods.names import name_of, parse_method
from fmfl_jax.experiment.methods.personalizations import PERSONALIZATIONS, Apfl, FedRep
from fmfl_jax.experiment.methods.selections import SELECTIONS, SelectionInputs
from fmfl_jax.fed.algorithms.lora.flora import Target
from fmfl_jax.fed.core.types import Aggregator, FederatedAlgorithm, GatheredUpdates, ServerState
from fmfl_jax.fed.selection import Selector
from fmfl_jax.transport.codec import Codec

REGISTRIES = {
    "aggregator": AGGREGATORS,
    "attack": ATTACKS,
    "uplink": CODECS,
    "selection": SELECTIONS,
    "algorithm": ALGORITHMS,
    "personalization": PERSONALIZATIONS,
    "incentive": INCENTIVES,
    "contribution": CONTRIBUTIONS,
}
# Names whose numbers have no default.
NUMBERS = {
    "norm_bound": "2.5",
    "noise": "0.1",
    "qsgd": "4",
    "rounding": "4",
    "topk": "0.5",
    "lowrank": "1",
    "fedprox": "0.1",
    "ditto": "0.1",
    "apfl": "0.5",
    "fedper": "1",
    "fedrep": "1",
    "private_lora": "1",
    "auction": "2",
    "posted": "2",
}
EVERY = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry]
LORA = {"m.lora_a": jnp.ones((3, 2)), "m.lora_b": jnp.zeros((2, 5))}


def parse(kind, spec):
    return parse_method(kind, spec, REGISTRIES[kind])


def spec_of(name):
    return f"{name}:{NUMBERS[name]}" if name in NUMBERS else name


def parts_for(name):
    """What the algorithm's parameters look like: LoRA factors, beside their base for FLoRA, some of them private."""
    trainable = LORA | {"x": jnp.zeros(2)} if name in ("fedper", "fedrep") else LORA
    if name == "flora":
        trainable = trainable | {"m.weight": jnp.zeros((3, 5))}
    if name == "private_lora":
        trainable = trainable | {key + ".private": value for key, value in LORA.items()}
    return Parts(
        grad_fn=lambda params, frozen, batch, key: (jnp.float32(0), params),
        client_optimizer=optax.sgd(0.1),
        client_lr=0.1,
        server_optimizer=optax.sgd(1.0),
        trainable=trainable,
        num_clients=4,
        local_steps=2,
        layers=(tuple(LORA), ("x",)),
        targets=(Target("m.lora_a", "m.lora_b", "m.weight", 0, 5),),
        ranks=(1, 2, 1, 2) if name in ("flora", "flexlora", "hetlora") else None,
    )


@pytest.mark.parametrize("kind, name", EVERY)
def test_every_name_parses_and_makes_its_kind(kind, name):
    method = parse(kind, spec_of(name))
    assert type(method) is REGISTRIES[kind][name] and name_of(method, REGISTRIES[kind]) == name
    assert method == parse(kind, spec_of(name)) and dataclasses.is_dataclass(method)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.anything = 1
    match kind:
        case "aggregator":
            assert isinstance(method.make(), Aggregator) and (method.make() == Aggregator()) == (name == "mean")
        case "attack":
            check_attack(name, method.make())
        case "uplink":
            check_codec(name, method.make())
        case "selection":
            inputs = SelectionInputs(cohort_size=3, sizes=np.arange(1, 7), deadline_s=1.0)
            check_selector(method.make(inputs))
        case "algorithm":
            check_algorithm(name, method.make(parts_for(name)))
        case "personalization":
            algorithm = method.make(parts_for(name), 0.0)
            check_algorithm(name, algorithm)
            assert algorithm.personal is not None
        case "incentive":
            offers = method.make(MarketInputs(3, np.ones(6)))(np.linspace(0.1, 0.3, 6))
            assert 0 < offers.chance.sum() <= 3 + 1e-9 and np.all(offers.payment_usd >= 0)


def check_attack(name, attack):
    if name in ("none", "label_flip"):
        assert attack is None
        return
    updates, malicious = {"w": jnp.asarray([[1.0, 2.0], [3.0, 5.0], [2.0, 2.0]])}, jnp.asarray([False, False, True])
    one = jnp.ones(3)
    sent = attack(GatheredUpdates(updates, one, one, {}, client_ids=jnp.arange(3)), malicious, jax.random.key(0))["w"]
    np.testing.assert_array_equal(sent[:2], updates["w"][:2])
    assert np.any(sent[2] != updates["w"][2])


def check_codec(name, codec):
    if name == "identity":
        assert codec is None
        return
    update = {"w": jnp.arange(64, dtype=jnp.float32).reshape(8, 8)}
    assert isinstance(codec, Codec)
    decoded, _, bits = codec.apply(update, codec.init(update), jax.random.key(0))
    assert decoded["w"].shape == (8, 8) and 0 < float(bits) < 64 * 32 and codec.exact_bits(update) == float(bits)


def check_selector(selector):
    assert isinstance(selector, Selector)
    ids = selector.select(selector.init(6), round=0, seed=0, predicted_s=np.full(6, 0.5, np.float32))
    assert len(ids) <= selector.capacity(6, num_rounds=1, seed=0) and np.all(np.diff(ids) > 0)
    assert np.all((0 <= ids) & (ids < 6))


def check_algorithm(name, algorithm):
    assert isinstance(algorithm, FederatedAlgorithm)
    state = algorithm.init(parts_for(name).trainable, 3)
    assert isinstance(state, ServerState) and int(state.seed) == 3 and int(state.round) == 0
    if algorithm.init_client is not None:
        algorithm.init_client(parts_for(name).trainable, jnp.int32(1))


@pytest.mark.parametrize("kind", REGISTRIES)
def test_no_name_falls_through(kind):
    for spec in ("", "fedavgg", ":0.1", "mean mean", next(iter(REGISTRIES[kind])).upper()):
        with pytest.raises(ValueError, match=f"^{kind}={spec}: expected one of {', '.join(REGISTRIES[kind])}$"):
            parse(kind, spec)


@pytest.mark.parametrize(
    "kind, spec, expected",
    [
        # a number that is missing, or one too many
        ("personalization", "ditto", "expected ditto:strength"),
        ("personalization", "ditto:", "expected ditto:strength"),
        ("personalization", "fedper", "expected fedper:layers"),
        ("personalization", "fedrep", "expected fedrep:layers,steps"),
        ("aggregator", "norm_bound", "expected norm_bound:bound"),
        ("aggregator", "median:0.2", "expected median"),
        ("aggregator", "krum:0.2,0.3", "expected krum:malicious"),
        ("aggregator", "krum:malicious=0.2,malicious=0.1", "expected krum:malicious"),
        ("aggregator", "krum:faulty=0.2", "expected krum:malicious"),
        ("attack", "noise", "expected noise:std"),
        ("algorithm", "fedprox", "expected fedprox:proximal"),
        ("algorithm", "scaffold:1", "expected scaffold"),
        ("uplink", "topk", "expected topk:fraction,error_feedback"),
        # no number
        ("aggregator", "krum:xyz", "'xyz' is no value"),
        ("personalization", "fedper:1.5", "'1.5' is no value"),
        ("personalization", "apfl:half", "'half' is no value"),
        ("uplink", "qsgd:4,coding=zip", "'zip' is no value"),
        ("uplink", "topk:0.5,error_feedback=yes", "'yes' is no value"),
        # out of range
        ("aggregator", "trimmed_mean:0.9", "in [0, 0.5)"),
        ("aggregator", "trimmed_mean:nan", "finite"),
        ("aggregator", "krum:nan", "finite"),
        ("aggregator", "krum:inf", "finite"),
        ("aggregator", "krum:-1", "below 0.5"),
        ("aggregator", "multi_krum:0.7", "below 0.5"),
        ("aggregator", "multi_krum:2.5", "a whole number"),
        ("aggregator", "norm_bound:0", "above 0"),
        ("aggregator", "norm_bound:nan", "finite"),
        ("attack", "scale:nan", "finite"),
        ("attack", "sign_flip:inf", "finite"),
        ("attack", "alie:inf", "finite"),
        ("attack", "ipm:nan", "finite"),
        ("attack", "noise:nan", "finite"),
        ("uplink", "topk:nan", "finite"),
        ("uplink", "topk:2", "fraction must be in"),
        ("uplink", "qsgd:0", "levels"),
        ("uplink", "qsgd:4,bucket_size=0", "bucket_size"),
        ("uplink", "rounding:1", "bits must be >= 2"),
        ("uplink", "lowrank:0", "rank must be >= 1"),
        ("selection", "oort:nan", "finite"),
        ("selection", "oort:-1", "alpha must be 0 or more"),
        ("algorithm", "fedprox:0", "proximal above 0"),
        ("algorithm", "fedprox:nan", "finite"),
        ("algorithm", "fedbuff:0", "buffer_size must be at least 1"),
        ("algorithm", "hetlora:1.5", "gamma in (0, 1]"),
        ("algorithm", "hetlora:0.9,nan", "finite"),
        ("personalization", "ditto:-1", "0 or more"),
        ("personalization", "ditto:nan", "finite"),
        ("personalization", "apfl:1.5", "in [0, 1] or learned"),
        ("personalization", "apfl:nan", "finite"),
        ("personalization", "fedper:0", "at least 1 layer"),
        ("personalization", "fedrep:1,0", "at least 1"),
        ("personalization", "private_lora:0", "at least 1 rank"),
        ("incentive", "auction", "expected auction:budget_usd"),
        ("incentive", "auction:0", "budget_usd must be above 0"),
        ("incentive", "auction:nan", "finite"),
        ("incentive", "posted:-1", "budget_usd must be above 0"),
        ("incentive", "contract:1,value=2", "give a budget_usd or a value"),
        ("incentive", "contract:1,types=0", "types must be at least 1"),
        ("incentive", "stackelberg:value=0", "value must be above 0"),
        ("contribution", "gtg:-1", "0 or more"),
        ("contribution", "comfedsv:0", "at least 1"),
    ],
)
def test_wrong_numbers_are_refused_before_any_model(kind, spec, expected):
    with pytest.raises(ValueError) as error:
        parse(kind, spec)
    assert str(error.value).startswith(f"{kind}={spec}: ") and expected in str(error.value), error.value


@pytest.mark.parametrize(
    "kind, spec, expected",
    [
        ("uplink", "qsgd:4,coding=elias", Qsgd(4, coding="elias")),
        ("uplink", "qsgd:4,128", Qsgd(4, bucket_size=128)),
        ("uplink", "topk:fraction=0.5,error_feedback=false", TopK(0.5, error_feedback=False)),
        ("personalization", "apfl:learned", Apfl("learned")),
        ("personalization", "apfl:1", Apfl(1.0)),
        ("personalization", "fedrep:2,steps=3", FedRep(2, 3)),
        ("attack", "alie", Alie(None)),
        ("attack", "alie:1.5", Alie(1.5)),
        ("algorithm", "fedbuff:3", FedBuff(3)),
        ("algorithm", "hetlora:regularization=0", HetLora(regularization=0.0)),
        ("incentive", "auction:1e-6", Auction(1e-6)),
        ("incentive", "contract:2,types=3", Contract(2.0, types=3)),
        ("incentive", "stackelberg:value=4", Stackelberg(value=4.0)),
        ("contribution", "comfedsv:50,rank=2", ComFedSV(50, rank=2)),
    ],
)
def test_fields_by_place_and_by_name(kind, spec, expected):
    assert parse(kind, spec) == expected
