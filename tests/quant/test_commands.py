"""The command, from a checkpoint on disk to AutoAWQ's format and back; the acceptance on a real checkpoint."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fmfl_jax import streams
from fmfl_jax.config import llama_preset
from fmfl_jax.data.batches import token_windows
from fmfl_jax.data.corpora import load_documents
from fmfl_jax.data.tokenizers import byte_tokenizer, load_tokenizer
from fmfl_jax.models.formats.checkpoint import load_checkpoint, save_checkpoint
from fmfl_jax.models.formats.gguf_saving import save_gguf
from fmfl_jax.models.params import init_params, is_weight
from fmfl_jax.models.quantize import check_group_size, quantize
from fmfl_jax.quant.awq import QuantConfig
from launch.benchmark_awq import make_perplexity
from tests.commands import run
from tests.golden.cases import logits


def test_quantize_writes_what_it_searched(tmp_path):
    config = llama_preset("tiny", num_layers=1)
    params = init_params(config, jax.random.key(0))
    save_checkpoint(tmp_path / "fp", config, params)
    text = "All work and no play makes Jack a dull boy. " * 20
    (tmp_path / "calib.txt").write_text(text)
    args = [
        f"--checkpoint={tmp_path / 'fp'}",
        f"--calib_text={tmp_path / 'calib.txt'}",
        f"--out={tmp_path / 'q'}",
        "--seq_len=32",
        "--num_windows=4",
    ]
    result = run("launch.quantize", *args, "--group_size=32", "--recipe=paper")
    assert result.status == 0, result.err
    summary = json.loads(result.out.strip().splitlines()[-1])
    assert "awq: 1 of 1 blocks" in result.err and summary["recipe"] == "paper"
    assert summary["calibration_tokens"] == 4 * 32 and summary["weight_bytes"] > 0

    windows = token_windows(byte_tokenizer(), [text], 32, add_bos=True, add_eos=True).windows
    order = streams.host_rng(streams.CALIBRATION, 0).permutation(len(windows))[:4]
    windows = windows[order, :-1]
    expected = quantize(config, params, windows, QuantConfig(group_size=32, recipe="paper"))
    read = load_checkpoint(tmp_path / "q").params
    assert sum(map(is_weight, read.values())) == 4
    for name, value in expected.items():
        if is_weight(value):
            np.testing.assert_allclose(read[name].dequantize(), value.dequantize(), rtol=1e-3, atol=1e-6)
        else:
            np.testing.assert_allclose(read[name], value, rtol=1e-5)

    with pytest.raises(ValueError, match="group_size 48 does not divide the model's embed_dim of 64"):
        check_group_size(config, 48)


def nibbles(words):
    """int32 [K, N/8] of an AutoAWQ file -> [K, N]: nibble i of word j is column 8 j + [0, 2, 4, 6, 1, 3, 5, 7][i]."""
    out = np.empty((words.shape[0], words.shape[1] * 8), np.int64)
    for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        out[:, column::8] = words.view(np.uint32) >> (4 * i) & 15
    return out


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_head_is_the_nearest_one_and_reads_back(tied, tmp_path):
    """The file decoded in NumPy is the head rounded to nearest in groups of 32, and the model read has its logits."""
    config = llama_preset("tiny", num_layers=1, vocab_size=264, tie_embeddings=tied)
    params = init_params(config, jax.random.key(0))
    save_checkpoint(tmp_path / "fp", config, params)
    result = run(
        "launch.quantize",
        f"--checkpoint={tmp_path / 'fp'}",
        f"--out={tmp_path / 'q'}",
        "--method=rtn",
        "--group_size=32",
        "--head=int4",
    )
    assert result.status == 0, result.err
    assert json.loads(result.out.strip().splitlines()[-1])["head"] == "int4"

    raw = json.loads((tmp_path / "q" / "config.json").read_text())
    assert raw["tie_word_embeddings"] is False and raw["quantization_config"]["lm_head"] is True
    assert raw["quantization_config"]["modules_to_not_convert"] is None
    file = load_file(tmp_path / "q" / "model.safetensors")
    np.testing.assert_array_equal(file["model.embed_tokens.weight"], params["embed_tokens.weight"])
    head = np.asarray(params["embed_tokens.weight"]).T if tied else np.asarray(params["lm_head.weight"])
    q, z, s = nibbles(file["lm_head.qweight"]), nibbles(file["lm_head.qzeros"]), file["lm_head.scales"]
    assert q.shape == (64, 264) and z.shape == s.shape == (2, 264)
    groups = head.reshape(2, 32, 264)
    low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
    np.testing.assert_array_equal(s, ((high - low) / 15).astype(np.float16))
    np.testing.assert_array_equal(z, np.round(-low / s.astype(np.float32)))
    s, z = s[:, None].astype(np.float32), z[:, None]
    np.testing.assert_array_equal(q.reshape(2, 32, 264), np.clip(np.round(groups / s) + z, 0, 15))
    decoded = (q.reshape(2, 32, 264) - z) * s

    read = load_checkpoint(tmp_path / "q")
    assert not read.config.tie_embeddings
    np.testing.assert_array_equal(read.params["lm_head.weight"].dequantize(), decoded.reshape(64, 264))
    tokens = np.arange(12, dtype=np.int32)[None]
    got = logits(read.config, read.params, tokens)
    dense = {"lm_head.weight": jnp.asarray(decoded.reshape(64, 264), jnp.float32)}
    expected = logits(read.config, dict(read.params) | dense, tokens)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())  # a CPU rounds x to 16 bits

    if tied:  # a GGUF file keeps it in 8 bits: half a step of 1/127 of a block's largest value, and that in float16
        save_gguf(tmp_path / "m.gguf", read.config, read.params, type_name="Q4_1", name="m")
        stored = np.asarray(load_checkpoint(tmp_path / "m.gguf", dequantize=True).params["lm_head.weight"])
        largest = np.abs(decoded).max(axis=1, keepdims=True)
        assert (np.abs(stored.reshape(2, 32, 264) - decoded) <= (0.5 + 127 * 2**-11) * largest / 127).all()


def test_a_head_that_the_format_cannot_hold_is_refused_before_the_blocks(tmp_path):
    config = llama_preset("tiny", num_layers=1, vocab_size=260)
    save_checkpoint(tmp_path / "fp", config, init_params(config, jax.random.key(0)))
    args = [f"--checkpoint={tmp_path / 'fp'}", f"--out={tmp_path / 'q'}", "--method=rtn"]
    for flag, named in (
        ("--head=int4", "lm_head [64, 260]: AutoAWQ's format needs"),
        ("--head=int8", "flag --head=int8: value should be one of <fp|int4>"),
    ):
        result = run("launch.quantize", *args, flag)
        assert result.status != 0 and named in result.err and "blocks" not in result.err
        assert not (tmp_path / "q").exists()
    assert "not by transformers or AutoAWQ" in " ".join(run("launch.quantize", "--helpshort").out.split())


def test_recovers_at_3_bits_on_a_real_checkpoint(shared_data):
    """Issue 2, section 4: fp 23.90, 3 bits in groups of 128: round to nearest 35.1, a prototype of AWQ 31.04."""
    checkpoint = load_checkpoint(shared_data / "ckpt" / "TinyStories-656K")
    tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    documents = load_documents(shared_data / "tinystories" / "tinystories_train_head_2MiB.txt")
    windows = token_windows(tokenizer, documents[:300], 128, add_bos=True, add_eos=True).windows[:64, :-1]
    perplexity = make_perplexity(checkpoint.config, tokenizer, documents[1000:1120])
    found = {"fp": perplexity(checkpoint.params)}
    for method in ("rtn", "awq"):
        packed = quantize(
            checkpoint.config,
            checkpoint.params,
            jnp.asarray(windows),
            QuantConfig(method=method, bits=3, group_size=128),
        )
        found[method] = perplexity(packed)
    assert abs(found["fp"] - 23.90) < 0.01 and abs(found["rtn"] - 35.11) < 0.1
    assert found["awq"] < 31.04
    assert (found["rtn"] - found["awq"]) / (found["rtn"] - found["fp"]) > 0.4
