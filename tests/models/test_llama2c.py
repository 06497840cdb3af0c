"""llama2.c files: the same weights in its order and rotary form give transformers' logits; real text; bad files."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.models.formats.checkpoint import load_checkpoint, open_checkpoint
from fmfl_jax.peft.split import NoPeftConfig, split
from tests.golden import weights
from tests.golden.cases import golden, logits

CASE = "mha_untied"  # theta 10000 and eps 1e-5, the only ones that llama2.c has
LAYERS, DIM, HIDDEN, HEADS, VOCAB, SEQ_LEN = 2, 32, 56, 4, 96, 128


def interleaved(weight):
    """The rows of each head from the two halves to neighbouring pairs: row 2 i is i, row 2 i + 1 is i + H/2."""
    head_dim = DIM // HEADS
    order = np.arange(head_dim).reshape(2, -1).T.ravel()
    return weight.reshape(HEADS, head_dim, DIM)[:, order].reshape(weight.shape)


def stacks():
    """{llama2.c's name: its bytes}, of all layers."""
    w = weights.base_weights(CASE)

    def layers(name, change=lambda x: x):
        return b"".join(change(w[f"model.layers.{i}.{name}.weight"]).tobytes() for i in range(LAYERS))

    return {
        "tok": w["model.embed_tokens.weight"].tobytes(),
        "att_norm": layers("input_layernorm"),
        "wq": layers("self_attn.q_proj", interleaved),
        "wk": layers("self_attn.k_proj", interleaved),
        "wv": layers("self_attn.v_proj"),
        "wo": layers("self_attn.o_proj"),
        "ffn_norm": layers("post_attention_layernorm"),
        "w1": layers("mlp.gate_proj"),
        "w2": layers("mlp.down_proj"),
        "w3": layers("mlp.up_proj"),
        "norm": w["model.norm.weight"].tobytes(),
        "wcls": w["lm_head.weight"].tobytes(),
    }


def legacy_file():
    s = stacks()
    tables = np.full((2, SEQ_LEN, DIM // HEADS // 2), np.nan, np.float32).tobytes()
    order = ("tok", "att_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3", "norm")
    header = struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, HEADS, -VOCAB, SEQ_LEN)
    return header + b"".join(s[name] for name in order) + tables + s["wcls"]


def version_1_file():
    s = stacks()
    order = ("att_norm", "ffn_norm", "norm", "tok", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "wcls")
    header = struct.pack("<Ii7iB", 0x616B3432, 1, DIM, HIDDEN, LAYERS, HEADS, HEADS, VOCAB, SEQ_LEN, 0)
    return header.ljust(256, b"\0") + b"".join(s[name] for name in order)


@pytest.mark.parametrize("make", [legacy_file, version_1_file])
def test_logits_equal_transformers(make, tmp_path):
    (tmp_path / "model.bin").write_bytes(make())
    loaded = load_checkpoint(tmp_path / "model.bin")
    assert loaded.tokenizer_path is None and loaded.config.max_seq_len == SEQ_LEN
    np.testing.assert_allclose(
        logits(loaded.config, loaded.params, weights.tokens(CASE)), golden(f"llama_{CASE}")["logits"], rtol=0, atol=1e-4
    )
    half = load_checkpoint(tmp_path / "model.bin", dtype="bfloat16").params
    assert half["lm_head.weight"].dtype == jnp.bfloat16 and half["norm.weight"].dtype == jnp.float32


def test_published_greedy_text(shared_data):
    """The first 60 tokens of the text that llama2.c's own test expects of stories260K at temperature 0."""
    folder = shared_data / "ckpt" / "stories260K"
    loaded = load_checkpoint(folder / "stories260K.bin")
    assert loaded.tokenizer_path == folder / "tok512.bin"
    model = split(loaded.config, loaded.params, NoPeftConfig(), key=jax.random.key(0))
    step = jax.jit(lambda tokens: jnp.argmax(model.merge(model.trainable, model.frozen)(tokens), axis=-1))
    tokens = np.ones((1, 61), np.int32)  # token 1 begins a text
    for t in range(60):
        tokens[0, t + 1] = np.asarray(step(tokens))[0, t]
    data, pieces, offset = loaded.tokenizer_path.read_bytes(), [], 4
    while offset < len(data):
        length = struct.unpack_from("<i", data, offset + 4)[0]
        pieces.append(data[offset + 8 : offset + 8 + length])
        offset += 8 + length
    text = b"".join(pieces[t] for t in tokens[0, 1:]).decode().lstrip()
    assert len(text) > 100
    assert (folder / "expected_greedy_200.txt").read_text().startswith(text)


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda data: data[:20], "truncated"),
        (lambda data: data[:-4], "truncated"),
        (lambda data: data + b"\0", "damaged"),
        (lambda data: struct.pack("<Ii", 0x616B3432, 2) + data[8:], "llama2.c version 2"),
        (lambda data: struct.pack("<7i", 32, 56, 2, 4, 4, 0, 128) + data[28:], "its header reads"),
        (lambda data: b"PK\3\4" + data[4:], "its header reads|truncated|not a llama2.c"),
    ],
)
def test_bad_file(damage, named, tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(damage(legacy_file()))
    with pytest.raises(ValueError, match=named) as error:
        open_checkpoint(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
