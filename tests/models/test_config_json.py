"""config.json: both transformers' ways to write rotary fields, and errors for what would change the mathematics."""

import json
import pathlib

import pytest

from fmfl_jax.config import RopeScaling, llama_preset
from fmfl_jax.models.formats.checkpoint import load_checkpoint
from fmfl_jax.models.formats.config_json import config_json, parse_config

PATH = pathlib.Path("somewhere/config.json")
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
MINIMAL = dict(
    model_type="llama", vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
)


@pytest.mark.parametrize("preset", ["tiny", "7b", "8b", "70b"])
def test_round_trip(preset):
    config = llama_preset(preset)
    raw = json.loads(json.dumps(config_json(config, dtype="bfloat16")))
    assert parse_config(raw, PATH) == config


def test_defaults_are_transformers():
    config = parse_config(MINIMAL, PATH)
    assert (
        config.num_kv_heads,
        config.head_dim,
        config.rope_theta,
        config.norm_eps,
        config.max_seq_len,
        config.tie_embeddings,
        config.rope_scaling,
    ) == (4, 16, 10000.0, 1e-6, 2048, False, None)


@pytest.mark.parametrize(
    "fields",
    [
        dict(rope_theta=5e5, rope_scaling=dict(rope_type="llama3", **LLAMA3)),
        dict(rope_theta=5e5, rope_scaling=dict(type="llama3", **LLAMA3)),
        dict(rope_parameters=dict(rope_type="llama3", rope_theta=5e5, **LLAMA3)),
    ],
)
def test_rope_in_both_versions(fields):
    config = parse_config(MINIMAL | fields, PATH)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
    )


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(attention_bias=True), "attention_bias is True"),
        (dict(mlp_bias=True), "mlp_bias is True"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (dict(model_type="mistral"), "model_type is 'mistral'"),
        (dict(model_type=None), "model_type is None"),
        (dict(sliding_window=4096), "sliding_window is 4096"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
        (dict(final_logit_softcapping=30.0), "final_logit_softcapping is 30.0"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "rope_scaling has rope type 'yarn'"),
        (dict(rope_scaling=dict(type="dynamic", factor=4.0)), "rope_scaling has rope type 'dynamic'"),
        (dict(rope_parameters=dict(rope_type="longrope")), "rope_parameters has rope type 'longrope'"),
        (dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)), "rope_parameters.partial_rotary"),
        (dict(rope_scaling=dict(rope_type="linear", factor=2.0, beta_fast=32)), "rope_scaling.beta_fast is 32"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "low_freq_factor is missing"),
        (dict(rope_scaling=dict(rope_type="linear", factor=0.5)), "factor must be at least 1"),
        (dict(rope_scaling=8.0), "rope_scaling is 8.0"),
        (dict(rope_theta=1e4, rope_parameters=dict(rope_type="default", rope_theta=5e5)), "rope_theta is 10000.0"),
        (dict(rope_scaling=dict(type="linear", factor=2.0), rope_parameters=dict(rope_type="default")), "differ"),
        (dict(hidden_size="64"), "hidden_size is '64'"),
        (dict(hidden_size=None), "hidden_size is missing"),
        (dict(num_attention_heads=True), "num_attention_heads is True"),
        (dict(num_attention_heads=5), "hidden_size 64 is no multiple"),
        (dict(num_key_value_heads=3), "num_kv_heads"),
        (dict(vocab_size=-1), "vocab_size must be positive"),
        (dict(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes'"),
    ],
)
def test_bad_fields_are_named(fields, named):
    with pytest.raises(ValueError) as error:
        parse_config(MINIMAL | fields, PATH)
    assert str(PATH) in str(error.value) and named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, named", [("{", "not JSON"), ("[]", "expected a JSON object")])
def test_damaged_file(text, named, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=named):
        load_checkpoint(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere")
