"""Checkpoints as parts: all bytes of all files, in the order in which the model computes."""

import jax
import ml_dtypes
import numpy as np
import pytest

from fmfl_jax.config import llama_preset
from fmfl_jax.experiment.delivery.sources import cast_safetensors, sources, stages_of
from fmfl_jax.models.formats.checkpoint import load_checkpoint, save_checkpoint
from fmfl_jax.models.formats.gguf_saving import save_gguf
from fmfl_jax.models.params import init_params

CONFIG = llama_preset("tiny")


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def joined(parts):
    """{file: bytes} of what the sources read."""
    files = {}
    for part in parts:
        data = files.setdefault(part.file, bytearray())
        data.extend(bytes(max(0, part.offset + part.nbytes - len(data))))
        data[part.offset : part.offset + part.nbytes] = part.read()
    return {name: bytes(data) for name, data in files.items()}


def test_a_folder_and_a_gguf_file(params, tmp_path):
    folder, gguf = tmp_path / "model", tmp_path / "tiny.gguf"
    save_checkpoint(folder, CONFIG, params, shard_bytes=100_000)
    (folder / "more").mkdir()
    (folder / "more" / "empty.txt").write_bytes(b"")
    save_gguf(gguf, CONFIG, params, type_name="Q4_1", name="tiny")
    found = sources(folder)
    assert joined(found) == {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert len({part.file for part in found if part.dtype == "F32"}) > 1, "the test needs shards"
    packed = sources(gguf)
    assert joined(packed) == {"tiny.gguf": gguf.read_bytes()}
    assert {part.dtype for part in packed} == {"", "F32", "Q4_1", "Q8_0"}
    for parts, first, last in (
        (found, "model.embed_tokens.weight", "model.norm.weight"),
        (packed, "token_embd.weight", "output_norm.weight"),
    ):
        stages = {part.name: part.stage for part in parts if part.name}
        assert [name for name, stage in stages.items() if stage == 0] == [first]
        assert [name for name, stage in stages.items() if stage == 3] == [last]
        assert all(part.stage == 0 for part in parts if not part.name)
        assert sum(stage == 1 for stage in stages.values()) == 9


def test_stages_of_names():
    assert stages_of(["lm_head.weight", "model.embed_tokens.weight", "model.layers.10.x", "model.layers.2.x"]) == {
        "lm_head.weight": 12,
        "model.embed_tokens.weight": 0,
        "model.layers.10.x": 11,
        "model.layers.2.x": 3,
    }
    assert stages_of(["lm_head.weight", "norm.weight", "blk.0.x"]) == {
        "lm_head.weight": 0,
        "norm.weight": 2,
        "blk.0.x": 1,
    }
    assert stages_of(["w"]) == {"w": 1}


def test_cast(params, tmp_path):
    save_checkpoint(tmp_path / "model", CONFIG, params)
    narrow = cast_safetensors(tmp_path / "model", tmp_path / "narrow")
    loaded = load_checkpoint(narrow).params
    for name, value in params.items():
        expected = np.asarray(value).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(loaded[name], np.float32), expected)
    assert (narrow / "config.json").read_bytes() == (tmp_path / "model" / "config.json").read_bytes()
    with pytest.raises(ValueError, match="needs safetensors"):
        cast_safetensors(tmp_path / "model" / "config.json", tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="nothing: no such file"):
        sources(tmp_path / "nothing")
