"""For the tests: the golden cases as GGUF files, written by gguf's own writer as llama.cpp's converter does it."""

import math
import pathlib

import gguf
import numpy as np

from tests.golden import weights

# (in tests/golden/weights.py's names, in GGUF's)
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """convert_hf_to_gguf.py's LlamaModel.permute."""
    return weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in NAMES:
        return f"{NAMES[stem]}.weight"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.weight"


def tensors(case: str) -> dict[str, np.ndarray]:
    """{name in GGUF: float32} of a case."""
    c = weights.SHAPE | weights.CASES[case]
    heads = {"self_attn.q_proj": c["num_attention_heads"], "self_attn.k_proj": c["num_key_value_heads"]}
    found = {}
    for name, value in weights.base_weights(case).items():
        turned = next((n for inner, n in heads.items() if inner in name), None)
        found[gguf_name(name)] = value if turned is None else permuted(value, turned)
    scaling = c.get("rope_scaling")
    if scaling is not None and scaling["rope_type"] == "llama3":
        found["rope_freqs.weight"] = llama3_factors(c, scaling)
    return found


def llama3_factors(c: dict, scaling: dict) -> np.ndarray:
    """convert_hf_to_gguf.py's generate_extra_tensors."""
    freqs = 1.0 / (c["rope_theta"] ** (np.arange(0, c["head_dim"], 2) / c["head_dim"]))
    old, low, high = (
        scaling[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    factors = []
    for freq in freqs:
        wavelength = 2 * math.pi / freq
        smooth = (old / wavelength - low) / (high - low)
        if wavelength < old / high:
            factors.append(1)
        elif wavelength > old / low:
            factors.append(scaling["factor"])
        else:
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)


def metadata(case: str) -> dict:
    c = weights.SHAPE | weights.CASES[case]
    found = {
        "llama.block_count": c["num_hidden_layers"],
        "llama.context_length": c["max_position_embeddings"],
        "llama.embedding_length": c["hidden_size"],
        "llama.feed_forward_length": c["intermediate_size"],
        "llama.attention.head_count": c["num_attention_heads"],
        "llama.attention.head_count_kv": c["num_key_value_heads"],
        "llama.attention.key_length": c["head_dim"],
        "llama.attention.value_length": c["head_dim"],
        "llama.rope.dimension_count": c["head_dim"],
        "llama.rope.freq_base": c["rope_theta"],
        "llama.attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
    }
    scaling = c.get("rope_scaling")
    if scaling is not None and scaling["rope_type"] == "linear":
        found |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": scaling["factor"]}
    return found


def write(path: pathlib.Path, metadata: dict, arrays: dict, *, architecture: str = "llama") -> pathlib.Path:
    """arrays: {name: array, or (uint8 [out, bytes], GGMLQuantizationType)}."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            kinds[type(value)](key, value)
    for name, value in arrays.items():
        data, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
