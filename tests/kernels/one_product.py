"""Multiplies twice in a process of its own and prints what w4a16 warns of (`test_cpu.py`)."""

import warnings

import jax.numpy as jnp
import numpy as np

from kernels.w4a16 import api, layout

if __name__ == "__main__":
    q = np.arange(64, dtype=np.uint8).reshape(4, 16) % 16
    zero, scale = np.full((1, 16), 8, np.uint8), np.full((1, 16), 0.5, np.float16)
    packed = [jnp.asarray(a) for a in layout.pack(q, zero, scale, group_size=4)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            y = api.matmul(jnp.ones((2, 4)), *packed, k=4, n=16, group_size=4)
    np.testing.assert_allclose(y[1], (q.astype(float) - 8).sum(0) / 2, atol=1e-3)
    print(*(str(w.message) for w in said if "w4a16" in str(w.message)), sep="\n")
