"""The random LLaMAs of the golden files: configurations, and weights drawn by name, the same under any numpy.

Imported by the tests and by the make_*.py scripts, which run in an environment of their own: numpy only.
"""

import zlib

import numpy as np

SHAPE = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
)
CASES = {
    # Grouped queries, a head_dim that is not hidden_size / heads, tied, and theta and eps far from the defaults.
    "gqa_tied": dict(
        num_key_value_heads=2, head_dim=12, tie_word_embeddings=True, rope_theta=500000.0, rms_norm_eps=1e-3
    ),
    # All three regimes of the frequencies: kept, interpolated, divided; positions far beyond the original 16.
    "llama3_rope": dict(
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        rope_scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "linear_rope": dict(
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        rope_scaling=dict(rope_type="linear", factor=4.0),
    ),
    "mha_untied": dict(
        num_key_value_heads=4, head_dim=8, tie_word_embeddings=False, rope_theta=10000.0, rms_norm_eps=1e-5
    ),
}


def draw(name: str, shape, stddev: float = 1.0) -> np.ndarray:
    """float32 normal(0, stddev), a function of `name` and `shape` alone (RandomState's stream is frozen)."""
    return (stddev * np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)).astype(np.float32)


def tokens(case: str, batch: int = 2, length: int = 48) -> np.ndarray:
    """int32 [batch, length]."""
    rng = np.random.RandomState(zlib.crc32(("tokens " + case).encode()))
    return rng.randint(0, SHAPE["vocab_size"], (batch, length)).astype(np.int32)


def base_weights(case: str) -> dict[str, np.ndarray]:
    """The checkpoint of a case, {published name: float32 [out, in]}. Attention is sharp and eps matters."""
    c = SHAPE | CASES[case]
    d, f, h = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * h, c["num_key_value_heads"] * h
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], d)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (d,),
            f"{layer}.post_attention_layernorm.weight": (d,),
            f"{layer}.self_attn.q_proj.weight": (q, d),
            f"{layer}.self_attn.k_proj.weight": (kv, d),
            f"{layer}.self_attn.v_proj.weight": (kv, d),
            f"{layer}.self_attn.o_proj.weight": (d, q),
            f"{layer}.mlp.gate_proj.weight": (f, d),
            f"{layer}.mlp.up_proj.weight": (f, d),
            f"{layer}.mlp.down_proj.weight": (d, f),
        }
    weights = {}
    for name, shape in shapes.items():
        if "norm" in name:
            weights[name] = 1 + draw(f"{case} {name}", shape, 0.2)
        else:
            weights[name] = draw(f"{case} {name}", shape, 0.05 if "embed" in name else 0.3)
    return weights
