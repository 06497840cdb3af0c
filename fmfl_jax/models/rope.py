"""Rotary position embedding (Su et al., 2021), half-rotation form, with linear and LLaMA-3.1 frequency scaling."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.config import RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """float32 [head_dim // 2] angular frequencies, radians per position: theta ** (-2 i / head_dim), then scaled.

    "llama3" (Grattafiori et al., 2024): wavelengths shorter than original / high_freq_factor stay, longer than
    original / low_freq_factor are divided by `factor`, those between are interpolated.
    """
    freq = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return freq.astype(np.float32)
    if scaling.kind == "linear":
        return (freq / scaling.factor).astype(np.float32)
    turns = scaling.original_max_seq_len * freq / (2 * math.pi)  # full turns over the original context
    keep = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return (keep * freq + (1 - keep) * freq / scaling.factor).astype(np.float32)


def rope_tables(positions, frequencies) -> tuple[jnp.ndarray, jnp.ndarray]:
    """cos and sin, float32 [..., T, H/2], of positions int32 [..., T].

    In float32 whatever the compute dtype: bfloat16 rounds position 257 to 256.
    """
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies)[(None,) * positions.ndim]
    return jnp.cos(angles), jnp.sin(angles)


@jax.custom_vjp
def apply_rope(x, cos, sin):
    """Rotates x [..., T, n, H] (n heads) by cos, sin [..., T, H/2]; the pair of dimension i is i + H/2.

    Differentiable by x, in reverse mode only: the gradient is rotated back, in one pass over it.
    """
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]  # [..., T, 1, H/2]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def _apply_rope_forward(x, cos, sin):
    return apply_rope(x, cos, sin), (cos, sin)


def _apply_rope_backward(tables, d_out):
    cos, sin = tables
    return apply_rope(d_out, cos, -sin), None, None


apply_rope.defvjp(_apply_rope_forward, _apply_rope_backward)
