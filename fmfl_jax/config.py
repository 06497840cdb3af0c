"""Configurations: frozen keyword-only dataclasses, checked when they are made, and the LLaMA presets."""

import dataclasses

from fmfl_jax.finite import finite_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class RopeScaling:
    """How rotary frequencies are stretched beyond the pre-training context.

    kind: "linear" divides every frequency by `factor`; "llama3" divides the low ones only (LLaMA 3.1), with a smooth
    passage between `low_freq_factor` and `high_freq_factor` turns over `original_max_seq_len` positions.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope scaling {self.kind!r} is not supported: expected 'linear' or 'llama3'")
        if self.factor < 1:
            raise ValueError(f"rope scaling factor must be at least 1, got {self.factor}")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "rope scaling needs low_freq_factor < high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class LlamaConfig:
    """The shape of a LLaMA (Touvron et al., 2023). Names follow the field's; see BUILD_NOTES.md.

    dtype is the compute dtype ("float32", "bfloat16" or "float16"); weights keep the dtype they are stored in.
    """

    vocab_size: int
    embed_dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    max_seq_len: int
    tie_embeddings: bool
    rope_scaling: RopeScaling | None = None
    dtype: str = "float32"

    def __post_init__(self):
        for name in (
            "vocab_size",
            "embed_dim",
            "hidden_dim",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "rope_theta",
            "norm_eps",
            "max_seq_len",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"LlamaConfig.{name} must be positive, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embedding, got {self.head_dim}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}")


_LLAMA2 = dict(vocab_size=32000, rope_theta=10000.0, norm_eps=1e-5, max_seq_len=4096, tie_embeddings=False)
_SMALL = dict(vocab_size=256, rope_theta=10000.0, norm_eps=1e-5, max_seq_len=512, tie_embeddings=True)
_LLAMA31_ROPE = RopeScaling(kind="llama3", factor=8.0)


def llama_preset(name: str, **overrides) -> LlamaConfig:
    """The LlamaConfig called `name`, with fields replaced by `overrides`.

    tiny and mini are byte-level models for a CPU; 7b, 13b, 70b are Llama 2 (Touvron et al., 2023b), 8b is Llama 3.1
    (Grattafiori et al., 2024). Raises ValueError for an unknown name.
    """
    presets = {
        "tiny": dict(embed_dim=64, hidden_dim=192, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, **_SMALL),
        "mini": dict(embed_dim=128, hidden_dim=384, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, **_SMALL),
        "7b": dict(
            embed_dim=4096, hidden_dim=11008, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, **_LLAMA2
        ),
        "8b": dict(
            embed_dim=4096,
            hidden_dim=14336,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            vocab_size=128256,
            rope_theta=500000.0,
            norm_eps=1e-5,
            max_seq_len=131072,
            tie_embeddings=False,
            rope_scaling=_LLAMA31_ROPE,
        ),
        "13b": dict(
            embed_dim=5120, hidden_dim=13824, num_layers=40, num_heads=40, num_kv_heads=40, head_dim=128, **_LLAMA2
        ),
        "70b": dict(
            embed_dim=8192, hidden_dim=28672, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128, **_LLAMA2
        ),
    }
    if name not in presets:
        raise ValueError(f"unknown model preset {name!r}: expected one of {', '.join(presets)}")
    return LlamaConfig(**(presets[name] | overrides))
