"""Damaged files and full disks: one line that names the file and the tensor, and nothing half-written left."""

import json
import os
import resource

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from fmfl_jax.config import llama_preset
from fmfl_jax.models.formats.checkpoint import load_checkpoint, open_checkpoint, save_checkpoint
from fmfl_jax.models.params import init_params
from tests.golden import weights
from tests.golden.cases import write_case

CASE = "mha_untied"
Q_PROJ = "model.layers.1.self_attn.q_proj"


def assert_line(error, *parts):
    assert "\n" not in str(error.value)
    for part in parts:
        assert str(part) in str(error.value), (part, str(error.value))


@pytest.mark.parametrize("keep", [0, 5, 100, 3000, -1])
def test_truncated_file(keep, tmp_path):
    file = write_case(tmp_path, CASE) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated") as error:
        open_checkpoint(tmp_path)
    assert_line(error, file)


def test_damaged_header(tmp_path):
    file = write_case(tmp_path, CASE) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8] = ord("[")
    file.write_bytes(data)
    with pytest.raises(ValueError, match="damaged safetensors header") as error:
        open_checkpoint(tmp_path)
    assert_line(error, file)


def test_every_flipped_header_byte_is_an_error_or_harmless(tmp_path):
    """No damage to the header ends in another exception than ValueError, or in a tensor of another shape."""
    file = write_case(tmp_path, "linear_rope") / "model.safetensors"
    good = file.read_bytes()
    shapes = {name: x.shape for name, x in load_checkpoint(tmp_path).params.items()}
    rng, refused = np.random.default_rng(0), 0
    length = int.from_bytes(good[:8], "little")
    for position in rng.integers(0, 8 + length, 60):
        data = bytearray(good)
        data[position] ^= int(rng.integers(1, 256))
        file.write_bytes(data)
        try:
            params = load_checkpoint(tmp_path).params
        except ValueError as e:
            assert str(tmp_path) in str(e) and "\n" not in str(e)
            refused += 1
        else:
            assert {name: x.shape for name, x in params.items()} == shapes
    assert refused > 20


@pytest.mark.parametrize(
    "change, parts",
    [
        (lambda t: t.pop(f"{Q_PROJ}.weight"), [f"{Q_PROJ}.weight is missing", [32, 32]]),
        (lambda t: t.update({f"{Q_PROJ}.weight": np.zeros((32, 31), np.float32)}), [Q_PROJ, [32, 31], [32, 32]]),
        (lambda t: t.update({f"{Q_PROJ}.weight": np.zeros((32, 32), np.int32)}), [f"{Q_PROJ}.weight", "I32", "BF16"]),
        (lambda t: t.update({f"{Q_PROJ}.bias": np.zeros(32, np.float32)}), [f"{Q_PROJ}.bias", "not expected"]),
        (lambda t: t.update({f"{Q_PROJ}.weight": np.zeros((32, 32), np.float16)}), [Q_PROJ.replace("q_", "k_"), "F16"]),
        (lambda t: t.pop("lm_head.weight"), ["lm_head.weight is missing"]),
    ],
)
def test_wrong_tensors(change, parts, tmp_path):
    write_case(tmp_path, CASE)
    tensors = weights.base_weights(CASE)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        open_checkpoint(tmp_path)
    assert_line(error, tmp_path, *parts)


def test_shards(tmp_path):
    config = llama_preset("tiny")
    save_checkpoint(tmp_path, config, init_params(config, jax.random.key(0)), shard_bytes=100_000)
    second = sorted(tmp_path.glob("model-*"))[1]
    data = second.read_bytes()
    second.unlink()
    with pytest.raises(FileNotFoundError) as error:
        open_checkpoint(tmp_path)
    assert_line(error, second)
    second.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="truncated") as error:
        open_checkpoint(tmp_path)
    assert_line(error, second)
    second.write_bytes(sorted(tmp_path.glob("model-*"))[0].read_bytes())
    with pytest.raises(ValueError, match="has no tensor") as error:
        open_checkpoint(tmp_path)
    assert_line(error, second)
    index = tmp_path / "model.safetensors.index.json"
    for shard in (7, None, ["model.safetensors"]):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
        with pytest.raises(ValueError, match="places model.norm.weight in .*: expected the name of a file") as error:
            open_checkpoint(tmp_path)
        assert_line(error, index)
    index.write_text(json.dumps({"weights": {}}))
    with pytest.raises(ValueError, match="weight_map"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected model.safetensors"):
        open_checkpoint(tmp_path)


def test_save_refuses_wrong_params(tmp_path):
    config = llama_preset("tiny")
    params = init_params(config, jax.random.key(0))
    for wrong, named in (
        (dict(list(params.items())[1:]), "missing"),
        (params | {"extra": params["norm.weight"]}, "extra"),
        (params | {"norm.weight": params["norm.weight"][:3]}, "norm.weight has shape"),
        (params | {"norm.weight": params["norm.weight"].astype("int32")}, "norm.weight has dtype"),
    ):
        with pytest.raises(ValueError, match=named):
            save_checkpoint(tmp_path / "out", config, wrong)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk():
    """No file may grow beyond 200 kB: writing more is an OSError, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_leaves_nothing(small_disk, tmp_path):
    config = llama_preset("tiny")
    params = init_params(config, jax.random.key(0))
    with pytest.raises(OSError) as error:
        save_checkpoint(tmp_path / "out", config, params)
    assert_line(error, tmp_path / "out", "could not be saved")
    assert os.listdir(tmp_path) == []
    # The same disk, an earlier checkpoint: it stays as it was.
    small = llama_preset("tiny", num_layers=1, vocab_size=4, hidden_dim=8)
    save_checkpoint(tmp_path / "out", small, init_params(small, jax.random.key(0)))
    with pytest.raises(OSError):
        save_checkpoint(tmp_path / "out", config, params)
    assert os.listdir(tmp_path) == ["out"]
    assert load_checkpoint(tmp_path / "out").config == small
