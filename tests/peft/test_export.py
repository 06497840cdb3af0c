"""Hugging Face PEFT's files: read as peft computes with them, written as peft writes them."""

import json
import os
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmfl_jax.config import llama_preset
from fmfl_jax.models.formats.checkpoint import load_checkpoint
from fmfl_jax.models.params import param_specs
from fmfl_jax.peft.adapter import AdapterConfig
from fmfl_jax.peft.export import load_peft, save_peft, trainable_shapes
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.prompt import PrefixConfig, PromptConfig
from fmfl_jax.peft.split import FullConfig, NoPeftConfig, split
from tests.golden import weights
from tests.golden.cases import HERE, golden, logits, write_case

CASE = "gqa_tied"
NAMES = ("lora", "lora_some", "prompt", "prefix")
CONFIG = llama_preset("tiny")
TUNINGS = (
    LoraConfig(rank=3, alpha=5.0, dropout=0.1, targets=("*_proj",)),
    LoraConfig(rank=2, alpha=2.5, targets=("layers.1.self_attn.*", "up_proj")),
    AdapterConfig(bottleneck_dim=5),
    PromptConfig(num_tokens=4),
    PrefixConfig(num_tokens=4),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_checkpoint(write_case(tmp_path_factory.mktemp("base"), CASE))


def trained(tuning):
    """Random values in every trainable parameter."""
    return {name: jnp.asarray(weights.draw(name, shape)) for name, shape in trainable_shapes(tuning, CONFIG).items()}


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_peft(name, base):
    tuning, trainable = load_peft(HERE / f"peft_{name}", base.config)
    got = logits(base.config, base.params, weights.tokens(CASE), tuning, trainable)
    np.testing.assert_allclose(got, golden("peft_logits")[name], rtol=0, atol=1e-4)
    untuned = golden(f"llama_{CASE}")["logits"]
    assert np.abs(golden("peft_logits")[name] - untuned).max() > 0.05  # the tuning matters


@pytest.mark.parametrize("name", NAMES)
def test_writes_what_peft_writes(name, base, tmp_path):
    """The same tensors bit for bit, and the same configuration but for fields at peft's defaults."""
    tuning, trainable = load_peft(HERE / f"peft_{name}", base.config)
    save_peft(tmp_path / "out", tuning, trainable, base.config, "some/base")
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", HERE / f"peft_{name}")
    )
    assert set(ours) == set(theirs)
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key])
    mine, peft = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "out", HERE / f"peft_{name}")
    )
    assert mine.pop("base_model_name_or_path") == "some/base"
    if peft.get("use_rslora"):  # the same scale in the other form
        peft["lora_alpha"] *= peft["r"] ** 0.5
        assert mine.pop("lora_alpha") == pytest.approx(peft.pop("lora_alpha"))
    assert {key: peft[key] for key in mine} == mine


@pytest.mark.parametrize("tuning", TUNINGS)
def test_round_trip(tuning, tmp_path):
    values = trained(tuning)
    save_peft(tmp_path / "out", tuning, values, CONFIG, "base")
    save_peft(tmp_path / "out", tuning, values, CONFIG, "base")  # a second run replaces the first
    config, loaded = load_peft(tmp_path / "out", CONFIG)
    assert trainable_shapes(config, CONFIG) == trainable_shapes(tuning, CONFIG)
    if isinstance(tuning, LoraConfig):
        assert (config.rank, config.alpha, config.dropout) == (tuning.rank, tuning.alpha, tuning.dropout)
    else:
        assert config == tuning
    jax.tree.map(np.testing.assert_array_equal, values, loaded)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("tuning", TUNINGS)
def test_shapes_are_those_of_split(tuning):
    trainable = jax.eval_shape(
        lambda params, key: split(CONFIG, params, tuning, key=key).trainable, param_specs(CONFIG), jax.random.key(0)
    )
    assert {name: x.shape for name, x in trainable.items()} == trainable_shapes(tuning, CONFIG)


def test_adapters_have_a_type_of_their_own(tmp_path):
    save_peft(tmp_path / "out", AdapterConfig(), trained(AdapterConfig()), CONFIG, "base")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "BOTTLENECK_ADAPTER"


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(peft_type="IA3"), "peft_type is 'IA3'"),
        (dict(peft_type=None), "peft_type is None"),
        (dict(use_dora=True), "use_dora is True"),
        (dict(bias="all"), "bias is 'all'"),
        (dict(rank_pattern={"q_proj": 2}), "rank_pattern"),
        (dict(alpha_pattern={"q_proj": 2}), "alpha_pattern"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(lora_bias=True), "lora_bias is True"),
        (dict(layer_replication=[[0, 2]]), "layer_replication"),
        (dict(task_type="SEQ_CLS"), "task_type is 'SEQ_CLS'"),
        (dict(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
        (dict(option_of_2030=3), "option_of_2030 is 3"),
        (dict(r="3"), "r is '3'"),
        (dict(r=4), "has shape"),
        (dict(lora_alpha=None), "lora_alpha is None"),
        (dict(lora_dropout=1.5), "dropout"),
        (dict(r=0), "rank must be at least 1"),
    ],
)
def test_unsupported_options_are_named(fields, named, tmp_path):
    source = HERE / "peft_lora"
    raw = json.loads((source / "adapter_config.json").read_text()) | fields
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    (tmp_path / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    config = load_case_config()
    with pytest.raises(ValueError) as error:
        load_peft(tmp_path, config)
    assert named in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def load_case_config():
    c = weights.SHAPE | weights.CASES[CASE]
    return llama_preset("tiny", vocab_size=c["vocab_size"], embed_dim=32, hidden_dim=56, head_dim=12)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda t: t.pop(f"{FIRST}.lora_B.weight"), f"{FIRST}.lora_B.weight is missing"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": np.zeros((3, 32), np.float32)}), "lm_head"),
        (lambda t: t.update({f"{FIRST}.lora_A.weight": np.zeros((3, 31), np.float32)}), "[3, 31]"),
        (lambda t: t.update({f"{FIRST}.lora_A.weight": np.zeros((3, 32), np.int32)}), "I32"),
        (lambda t: t.clear(), "no LoRA tensors"),
    ],
)
def test_wrong_tensors_are_named(change, named, tmp_path):
    source = HERE / "peft_lora"
    tensors = load_file(source / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    with pytest.raises(ValueError) as error:
        load_peft(tmp_path, load_case_config())
    assert named in str(error.value) and str(tmp_path) in str(error.value)


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        load_peft(tmp_path, CONFIG)
    save_peft(tmp_path / "out", PromptConfig(), trained(PromptConfig()), CONFIG, "base")
    file = tmp_path / "out" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        load_peft(tmp_path / "out", CONFIG)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        load_peft(tmp_path / "out", CONFIG)


def test_save_refuses(tmp_path):
    values = trained(PromptConfig())
    for tuning, wrong, named in (
        (PromptConfig(), {}, "soft_prompt.embeddings is missing"),
        (PromptConfig(num_tokens=3), values, "has shape"),
        (PromptConfig(), values | {"extra": values["soft_prompt.embeddings"]}, "extra is not"),
        (FullConfig(), values, "save the model"),
        (NoPeftConfig(), {}, "save the model"),
    ):
        with pytest.raises(ValueError, match=named):
            save_peft(tmp_path / "out", tuning, wrong, CONFIG, "base")
    assert not list(tmp_path.iterdir())


def test_full_disk_keeps_the_earlier_result(tmp_path):
    small, big = PromptConfig(num_tokens=1), PromptConfig(num_tokens=500)
    save_peft(tmp_path / "out", small, trained(small), CONFIG, "base")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="could not be saved"):
            save_peft(tmp_path / "out", big, trained(big), CONFIG, "base")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["out"] and load_peft(tmp_path / "out", CONFIG)[0] == small
