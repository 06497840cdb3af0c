"""Low-rank factors beside the 4-bit product, for a batch of different clients (multi-tenant personalized models).

    y_c = x_c @ W + scale_c * (x_c @ A_c) @ B_c      (LoRA: Hu et al., 2021), one W for all clients c.

The base product folds all clients into M and reads the packed weight once; the factors are XLA's batched products. They
touch rank * (K + N) numbers a client, 0.4 % of the weight at rank 8 and K = N = 4096, so a grouped kernel would save no
traffic, only the launches of two small products. Which is faster on a GPU is for `bench.py` to say.
"""

import jax
import jax.numpy as jnp

from kernels.w4a16 import api


def low_rank(x, lora_a, lora_b, scale) -> jax.Array:
    """scale_c * (x_c @ A_c) @ B_c in x's dtype, accumulated in fp32.

    Args:
      x: [C, T, K]; lora_a: [C, K, R]; lora_b: [C, R, N] (any float dtype, cast to x's); scale: [C] float.
    """
    h = jnp.einsum("ctk,ckr->ctr", x, lora_a.astype(x.dtype), preferred_element_type=jnp.float32)
    h = (h * scale.astype(jnp.float32)[:, None, None]).astype(x.dtype)
    return jnp.einsum("ctr,crn->ctn", h, lora_b.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)


def matmul(
    x,
    qweight,
    scale,
    zero_point,
    lora_a,
    lora_b,
    lora_scale,
    adapter=None,
    *,
    k: int,
    n: int,
    group_size: int,
    implementation=None,
) -> jax.Array:
    """One projection of C clients that share W and differ in their LoRA factors.

    Args:
      x: [C, T, K], one row of sequences or one token (T = 1) per client.
      qweight, scale, zero_point, k, n, group_size, implementation: as in `api.matmul`.
      lora_a: [A, K, R]; lora_b: [A, R, N]; lora_scale: [A] (alpha / rank), a bank of A adapters.
      adapter: int [C], each client's adapter; None where A = C and client c has adapter c.

    Returns:
      [C, T, N] in x's dtype; differentiable in x, lora_a, lora_b and lora_scale.

    Raises:
      ValueError: shapes that do not agree.
    """
    if x.ndim != 3:
        raise ValueError(f"w4a16.lora: x has shape {tuple(x.shape)}, expected [clients, tokens, {k}]")
    bank, rank = lora_a.shape[0], lora_a.shape[-1]
    for name, array, shape in (
        ("lora_a", lora_a, (bank, k, rank)),
        ("lora_b", lora_b, (bank, rank, n)),
        ("lora_scale", lora_scale, (bank,)),
        ("adapter", adapter, (x.shape[0],)),
    ):
        if array is not None and tuple(array.shape) != shape:
            raise ValueError(f"w4a16.lora: {name} has shape {tuple(array.shape)}, expected {shape}")
    if adapter is not None:
        lora_a, lora_b, lora_scale = lora_a[adapter], lora_b[adapter], lora_scale[adapter]
    elif bank != x.shape[0]:
        raise ValueError(f"w4a16.lora: {bank} adapters for {x.shape[0]} clients; say which with `adapter`")
    delta = low_rank(x, lora_a, lora_b, lora_scale)
    return api.matmul(
        x, qweight, scale, zero_point, k=k, n=n, group_size=group_size, implementation=implementation, residual=delta
    )
