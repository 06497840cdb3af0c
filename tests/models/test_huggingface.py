"""Hugging Face checkpoints: logits equal transformers', and what is saved is read back bit for bit."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmfl_jax.config import llama_preset
from fmfl_jax.models.formats.checkpoint import load_checkpoint, open_checkpoint, save_checkpoint
from fmfl_jax.models.params import init_params, param_specs
from tests.golden import weights
from tests.golden.cases import CASES, golden, logits, write_case

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def tiny():
    config = llama_preset("tiny", tie_embeddings=False)
    return config, init_params(config, jax.random.key(0))


def assert_same(left, right):
    assert set(left) == set(right)
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert np.array_equal(np.asarray(left[name]), np.asarray(right[name])), name


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    loaded = load_checkpoint(write_case(tmp_path, case))
    expected = golden(f"llama_{case}")["logits"]
    assert np.abs(expected).max() > 1  # the tolerance means something
    np.testing.assert_allclose(
        logits(loaded.config, loaded.params, weights.tokens(case)), expected, rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("case", CASES)
def test_saved_checkpoint_is_transformers_own(case, tmp_path):
    """Names, shapes and values are those of the state dictionary, the config says the same (in version 4's words)."""
    loaded = load_checkpoint(write_case(tmp_path / "in", case))
    save_checkpoint(tmp_path / "out", loaded.config, loaded.params)
    saved, expected = load_file(tmp_path / "out" / "model.safetensors"), weights.base_weights(case)
    shapes = json.loads(str(golden(f"llama_{case}")["shapes"]))
    assert {name: list(x.shape) for name, x in saved.items()} == {
        name: shape for name, shape in shapes.items() if name in expected
    }
    assert_same(saved, expected)
    again = load_checkpoint(tmp_path / "out")
    assert again.config == loaded.config
    assert_same(again.params, loaded.params)


def test_real_checkpoint_equals_transformers(shared_data):
    expected = golden("tinystories_656k")
    loaded = load_checkpoint(shared_data / "ckpt" / "TinyStories-656K")
    assert loaded.tokenizer_path.name == "tokenizer.json"
    got = logits(loaded.config, loaded.params, expected["tokens"])
    np.testing.assert_allclose(got[:, ::8], expected["logits"], rtol=0, atol=TOLERANCE)
    log_p = jax.nn.log_softmax(got[:, :-1], axis=-1)
    loss = -np.take_along_axis(np.asarray(log_p), expected["tokens"][:, 1:, None], axis=-1).mean()
    assert abs(loss - expected["loss"]) < 1e-5


def test_shards_and_tokenizer(tiny, tmp_path):
    config, params = tiny
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    (tmp_path / "tok" / "tokenizer_config.json").write_text("[]")
    save_checkpoint(
        tmp_path / "out", config, params, tokenizer_path=tmp_path / "tok" / "tokenizer.json", shard_bytes=100_000
    )
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * math.prod(spec.shape) for spec in param_specs(config).values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.tokenizer_path == tmp_path / "out" / "tokenizer.json"
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "[]"
    assert_same(loaded.params, params)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_dtypes(stored, tiny, tmp_path):
    """Matrices keep the file's dtype or take the one asked for; norms are float32 always."""
    config, params = tiny
    narrow = {name: x if x.ndim == 1 else x.astype(stored) for name, x in params.items()}
    save_checkpoint(tmp_path / "out", config, narrow)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == stored
    assert_same(load_checkpoint(tmp_path / "out").params, narrow)
    wide = load_checkpoint(tmp_path / "out", dtype="float32").params
    assert_same(wide, {name: x.astype("float32") for name, x in narrow.items()})


def test_open_reads_one_tensor_at_a_time(tiny, tmp_path):
    config, params = tiny
    save_checkpoint(tmp_path / "out", config, params)
    opened = open_checkpoint(tmp_path / "out")
    assert set(opened.params) == set(params) and len(opened.params) == len(params)
    before = np.asarray(opened.params["norm.weight"])
    file = tmp_path / "out" / "model.safetensors"
    changed = load_file(file)
    changed["model.norm.weight"] = changed["model.norm.weight"] + 1
    save_file(changed, file)
    assert not np.array_equal(np.asarray(open_checkpoint(tmp_path / "out").params["norm.weight"]), before)
    assert np.array_equal(before, np.ones(config.embed_dim, np.float32))  # a copy, not the map of a file that changed


def test_tied_head_under_either_name(tmp_path):
    case = "gqa_tied"
    folder = write_case(tmp_path, case)
    expected = load_checkpoint(folder).params
    tensors = weights.base_weights(case)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert_same(load_checkpoint(folder).params, expected)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert_same(load_checkpoint(folder).params, expected)


def test_saved_twice_is_replaced_but_not_other_peoples_files(tiny, tmp_path):
    config, params = tiny
    save_checkpoint(tmp_path / "out", config, params, shard_bytes=100_000)
    save_checkpoint(tmp_path / "out", config, jax.tree.map(lambda x: x + jnp.ones_like(x), params))
    assert len(list((tmp_path / "out").iterdir())) == 2
    assert float(load_checkpoint(tmp_path / "out").params["norm.weight"][0]) == 2
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="thesis.tex"):
        save_checkpoint(tmp_path / "out", config, params)
    assert float(load_checkpoint(tmp_path / "out").params["norm.weight"][0]) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
