"""4-bit checkpoints: decoded as AutoAWQ and compressed-tensors decode them, saved and read back to the last bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmfl_jax.config import llama_preset
from fmfl_jax.models.formats import awq_gemm, compressed_tensors
from fmfl_jax.models.formats.checkpoint import load_checkpoint, open_checkpoint, save_checkpoint
from fmfl_jax.models.params import init_params, projections
from fmfl_jax.quant.int4 import Int4Weight
from tests.golden.cases import golden, logits

CONFIG = llama_preset("tiny", vocab_size=40)  # embed_dim 64, hidden_dim 192, 4 heads of 16, 2 key heads
MATRICES = sorted({p.matrix + ".weight" for p in projections(CONFIG).values()})


def random_int4(k, n, group_size, seed, top=15):
    rng = np.random.default_rng(seed)
    groups = 1 if group_size == -1 else -(-k // group_size)
    q, z = (rng.integers(0, top + 1, (rows, n)).astype(np.uint8) for rows in (k, groups))
    return Int4Weight.pack(q, rng.uniform(0.001, 0.05, (groups, n)).astype(np.float16), z, group_size=group_size)


def quantized_params(group_size=32, keep=(), top=15):
    params = init_params(CONFIG, jax.random.key(0), dtype="float16")
    for i, name in enumerate(MATRICES):
        if name not in keep:
            params[name] = random_int4(*params[name].shape, group_size, i, top)
    return params


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)  # shapes and group sizes are in the structure
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        assert a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))


def test_autoawq_decodes_the_same():
    g = golden("int4_formats")
    q, scale, zero = awq_gemm.decode(g["awq_qweight"], g["awq_qzeros"], g["awq_scales"])
    weight = Int4Weight.pack(q, scale, zero, group_size=32)
    np.testing.assert_array_equal(np.asarray(weight.dequantize()), g["awq_weight"])
    for ours, theirs in zip(awq_gemm.encode(weight, [slice(0, 24)]), ("awq_qweight", "awq_qzeros", "awq_scales")):
        np.testing.assert_array_equal(ours, g[theirs])


@pytest.mark.parametrize("name, group_size", [("group", 32), ("channel", -1), ("symmetric", 32)])
def test_compressed_tensors_decodes_the_same(name, group_size):
    g = golden("int4_formats")
    n, k = g[f"{name}_weight"].shape
    suffixes = ["weight_packed", "weight_scale", "weight_shape"] + ["weight_zero_point"] * (name != "symmetric")
    scheme = compressed_tensors.Scheme(group_size, name == "symmetric")
    tensors = {suffix: g[f"{name}_{suffix}"] for suffix in suffixes}
    for suffix, (_, shape) in compressed_tensors.shapes(k, n, scheme).items():
        assert tensors[suffix].shape == shape
    weight = Int4Weight.pack(*compressed_tensors.decode(tensors, k, n), group_size=group_size)
    np.testing.assert_array_equal(np.asarray(weight.dequantize()).T, g[f"{name}_weight"])


@pytest.mark.parametrize("group_size, top", [(32, 15), (64, 15), (16, 15), (-1, 15), (32, 7)])
def test_awq_round_trip(group_size, top, tmp_path):
    params = quantized_params(group_size, top=top)
    save_checkpoint(tmp_path / "out", CONFIG, params, shard_bytes=50_000)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert raw == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    assert_same(load_checkpoint(tmp_path / "out").params, params)


def test_awq_file_is_as_the_format_says(tmp_path):
    """Against the definition, element by element: word j, nibble i holds column 8 j + [0, 2, 4, 6, 1, 3, 5, 7][i]."""
    params = quantized_params(32, keep=("layers.1.mlp.down_proj.weight",))
    save_checkpoint(tmp_path / "out", CONFIG, params)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    q, scale, zero = params["layers.0.self_attn.qkv_proj.weight"].unpack()
    name, columns = "model.layers.0.self_attn.k_proj", slice(64, 96)
    words = saved[f"{name}.qweight"].view(np.uint32)
    for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        np.testing.assert_array_equal(words >> (4 * i) & 15, q[:, columns][:, column::8])
    assert saved[f"{name}.qzeros"].shape == (2, 4) and zero.shape == (2, 128)
    np.testing.assert_array_equal(saved[f"{name}.scales"], scale[:, columns])
    np.testing.assert_array_equal(
        saved["model.layers.1.mlp.down_proj.weight"], np.asarray(params["layers.1.mlp.down_proj.weight"]).T
    )
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["quantization_config"]["modules_to_not_convert"] == ["model.layers.1.mlp.down_proj"]
    assert_same(load_checkpoint(tmp_path / "out").params, params)


def test_logits_are_those_of_the_dequantized_model(tmp_path):
    params = quantized_params(32)
    save_checkpoint(tmp_path / "out", CONFIG, params)
    loaded = load_checkpoint(tmp_path / "out", dtype="float32").params
    plain = jax.jit(
        lambda params: {name: x.dequantize() if isinstance(x, Int4Weight) else x for name, x in params.items()}
    )(params)
    plain = {name: np.asarray(x, np.float32) for name, x in plain.items()}
    tokens = np.arange(40, dtype=np.int32)[None]
    np.testing.assert_allclose(
        logits(CONFIG, loaded, tokens), logits(CONFIG, plain, tokens), rtol=0, atol=3e-4
    )  # a CPU rounds x


def test_awq_cannot_hold(tmp_path):
    down = "layers.1.mlp.down_proj.weight"
    uneven = quantized_params(32) | {down: random_int4(192, 64, 128, 0)}
    unround = quantized_params(32)
    _, scale, _ = unround[down].unpack()
    unround[down] = Int4Weight.pack(
        np.zeros((192, 64), np.uint8),
        scale.astype(np.float32) * np.float32(1.0001),
        np.zeros((6, 64), np.uint8),
        group_size=32,
    )
    for params, named in (
        (quantized_params(128), r"\[192, 64\].*group size 128 divides"),
        (uneven, "one group size"),
        (unround, "down_proj.*float16 scales"),
    ):
        with pytest.raises(ValueError, match=named):
            save_checkpoint(tmp_path / "out", CONFIG, params)
    assert not list(tmp_path.iterdir())


def write_compressed(folder, params, *, symmetric, config=None):
    """The params as llm-compressor lays them out, written with the nibbles set one by one."""
    tensors, raw = {}, config or {}
    save_checkpoint(
        folder,
        CONFIG,
        {name: x if not isinstance(x, Int4Weight) else np.zeros(x.shape, np.float16) for name, x in params.items()},
    )
    tensors = load_file(folder / "model.safetensors")
    for name, p in projections(CONFIG).items():
        q, scale, zero = (x[:, p.columns].T for x in params[f"{p.matrix}.weight"].unpack())  # [N, K], [N, G]
        packed = np.zeros((p.out_dim, p.in_dim // 8), np.uint32)
        zeros = np.zeros((p.out_dim // 8, zero.shape[1]), np.uint32)
        for i in range(8):
            packed |= q[:, i::8].astype(np.uint32) << (4 * i)
            zeros |= zero[i::8].astype(np.uint32) << (4 * i)
        del tensors[f"model.{name}.weight"]
        tensors |= {
            f"model.{name}.weight_packed": packed.view(np.int32),
            f"model.{name}.weight_scale": scale.copy(),
            f"model.{name}.weight_shape": np.array([p.out_dim, p.in_dim]),
        }
        if not symmetric:
            tensors[f"model.{name}.weight_zero_point"] = zeros.view(np.int32)
    save_file(tensors, folder / "model.safetensors")
    weights = dict(
        num_bits=4,
        type="int",
        symmetric=symmetric,
        strategy="group",
        group_size=32,
        actorder=None,
        dynamic=False,
        block_structure=None,
        observer="minmax",
    ) | raw.pop("weights", {})
    group = dict(targets=["Linear"], weights=weights, input_activations=None, output_activations=None)
    quantization = (
        dict(
            quant_method="compressed-tensors",
            format="pack-quantized",
            config_groups={"group_0": group},
            ignore=["lm_head"],
            kv_cache_scheme=None,
            quantization_status="compressed",
        )
        | raw
    )
    edit_config(folder, quantization)


def edit_config(folder, quantization):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": quantization}))


@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors_checkpoint(symmetric, tmp_path):
    params = quantized_params(32)
    if symmetric:
        params = {
            name: x
            if not isinstance(x, Int4Weight)
            else Int4Weight.pack(x.unpack()[0], x.unpack()[1], np.full_like(x.unpack()[2], 8), group_size=32)
            for name, x in params.items()
        }
    write_compressed(tmp_path, params, symmetric=symmetric)
    assert_same(load_checkpoint(tmp_path).params, params)


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(weights=dict(num_bits=8)), "num_bits is 8"),
        (dict(weights=dict(actorder="group")), "actorder is 'group'"),
        (dict(weights=dict(type="float")), "type is 'float'"),
        (dict(weights=dict(strategy="tensor")), "strategy is 'tensor'"),
        (dict(format="int-quantized"), "format is 'int-quantized'"),
        (dict(config_groups={}), "config_groups"),
        (dict(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (dict(weights=dict(group_size=64)), "weight_scale has shape"),
    ],
)
def test_unsupported_compressed_tensors(changes, named, tmp_path):
    write_compressed(tmp_path, quantized_params(32), symmetric=False, config=json.loads(json.dumps(changes)))
    with pytest.raises(ValueError, match=named) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(bits=8), "bits is 8"),
        (dict(version="gemv"), "version is 'gemv'"),
        (dict(zero_point=False), "zero_point is False"),
        (dict(group_size=0), "group_size is 0"),
        (dict(group_size=64), "qzeros has shape"),
        (dict(group_size=50), r"group size 50 divides"),
        (dict(quant_method="gptq"), "quant_method is 'gptq'"),
    ],
)
def test_unsupported_awq(changes, named, tmp_path):
    save_checkpoint(tmp_path, CONFIG, quantized_params(32))
    edit_config(tmp_path, awq_gemm.quantization_json(32, []) | changes)
    with pytest.raises(ValueError, match=named) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_half_quantized_matrix_is_named(tmp_path):
    save_checkpoint(tmp_path, CONFIG, quantized_params(32))
    tensors = load_file(tmp_path / "model.safetensors")
    for suffix in awq_gemm.SUFFIXES:
        del tensors[f"model.layers.0.self_attn.v_proj.{suffix}"]
    tensors["model.layers.0.self_attn.v_proj.weight"] = np.zeros((32, 64), np.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="v_proj is not, but layers.0.self_attn.qkv_proj is one matrix"):
        open_checkpoint(tmp_path)


def test_compressed_tensors_with_bfloat16_scales(tmp_path):
    """Scales keep their dtype; the matrix is (q - z) s exactly; q, k, v with scales of two dtypes are refused."""
    params = {
        name: Int4Weight.pack(x.unpack()[0], x.unpack()[1].astype(jnp.bfloat16), x.unpack()[2], group_size=32)
        if isinstance(x, Int4Weight)
        else x
        for name, x in quantized_params(32).items()
    }
    write_compressed(tmp_path, params, symmetric=False)
    loaded = load_checkpoint(tmp_path, dtype="float32")
    plain = dict(loaded.params)
    for name in MATRICES:
        assert loaded.params[name].scale.dtype == jnp.bfloat16
        q, scale, zero = (np.asarray(x).astype(np.float32) for x in params[name].unpack())
        plain[name] = jnp.asarray((q - np.repeat(zero, 32, axis=0)) * np.repeat(scale, 32, axis=0))
        assert np.array_equal(loaded.params[name].dequantize(), plain[name])
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    got, expected = (logits(loaded.config, p, tokens) for p in (loaded.params, plain))
    # The CPU kernel rounds x to 16 bits: 2.5e-5 in every product.
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-4 * np.abs(expected).max())

    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj.weight_scale"
    save_file(tensors | {name: tensors[name].astype(np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="scale of .*v_proj is F32 and of .*q_proj BF16"):
        open_checkpoint(tmp_path)
