"""Hugging Face checkpoints: logits equal transformers', and what is saved is read back bit for bit."""

import json
import math
import warnings

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


def test_head_that_differs_from_a_tied_embedding_is_used(tmp_path):
    """config.json says tied, the file holds another head: transformers' logits of the untied model, and a line."""
    folder = write_case(tmp_path / "in", "mha_untied", tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="lm_head.weight differs: the head is used") as said:
        loaded = load_checkpoint(folder)
    assert len(said) == 1 and str(folder) in str(said[0].message)
    expected = golden("llama_mha_untied")["logits"]
    got = logits(loaded.config, loaded.params, weights.tokens("mha_untied"))
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
    save_checkpoint(tmp_path / "out", loaded.config, loaded.params)
    assert_same(load_checkpoint(tmp_path / "out").params, loaded.params)  # its config says untied: no warning


@pytest.mark.parametrize("theta, said", [(10000.0, 0), (500000.0, 1)])
def test_a_rotary_table_that_is_not_the_config_s_is_told(theta, said, tmp_path):
    folder, file = write_case(tmp_path, "mha_untied"), tmp_path / "model.safetensors"
    table = theta ** (-np.arange(0, 8, 2) / 8)
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": table.astype(np.float32) for i in range(2)}
    save_file(weights.base_weights("mha_untied") | tables, file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_checkpoint(folder)
    assert len(caught) == said and all("inv_freq is not the table" in str(w.message) for w in caught)


def test_tensors_that_the_index_does_not_list(tiny, tmp_path):
    """A shard's unlisted tensor is used; one that nothing needs, or that two shards hold, is refused by name."""
    save_checkpoint(tmp_path, *tiny, shard_bytes=100_000)
    index, first = tmp_path / "model.safetensors.index.json", sorted(tmp_path.glob("*.safetensors"))[0]
    raw = json.loads(index.read_text())
    del raw["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(raw))
    assert_same(load_checkpoint(tmp_path).params, tiny[1])
    tensors = load_file(first)
    for name, message in (("model.extra", "model.extra is not expected"), ("lm_head.weight", "lm_head.weight is in ")):
        save_file(tensors | {name: np.zeros(3, np.float32)}, first)
        with pytest.raises(ValueError, match=message):
            open_checkpoint(tmp_path)


def test_every_end_token_of_both_files(tiny, tmp_path):
    """The ids of config.json and generation_config.json, one or several, through saving with a tokenizer too."""
    folder = write_case(tmp_path / "in", "gqa_tied", eos_token_id=[2, 90], bos_token_id=5)
    assert open_checkpoint(folder).stop_tokens == (2, 90)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert open_checkpoint(folder).stop_tokens == (2, 7, 90)
    (folder / "tokenizer.model").write_text("")
    save_checkpoint(tmp_path / "out", *tiny, tokenizer_path=folder / "tokenizer.model")
    assert open_checkpoint(tmp_path / "out").stop_tokens == (2, 7, 90)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == 5
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id is '</s>'"):
        open_checkpoint(folder)
