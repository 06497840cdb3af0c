"""Int8Weight: a matrix in 8-bit integers, kept as two 4-bit ones so that the 4-bit kernels compute with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.quant.int4 import Int4Weight

_LIMIT = 127.0
_COLUMNS = 4096
_OFFSET = 128  # makes q + 128 = 16 high + low, both 0..15


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Weight:
    """W[k, n] ~ q[k, n] * scale[k // group_size, n], q in -128..127. GGUF's Q8_0 is kept as it is: `pack`.

    halves: an Int4Weight [2 K, N], 16 (high - 8) above low, so that x @ W = [x, x] @ halves.
    """

    halves: Int4Weight

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        k, n = self.halves.shape
        return k // 2, n

    def columns(self, index):
        """W[:, index] for int32 index [...], float32 [..., K]: only these columns are unpacked."""
        k, _ = self.shape
        q, scale, zero = self.halves.columns(index.ravel())
        q, zero = q.astype(jnp.float32), zero.astype(jnp.float32)
        groups = q.reshape(scale.shape[0], -1, index.size) - zero[:, None]  # [G, group_size, T]
        high, low = jnp.split((groups * scale[:, None].astype(jnp.float32)).reshape(2 * k, -1), 2)  # [K, T] each
        return (high + low).T.reshape(*index.shape, k)

    @classmethod
    def pack(cls, q, scale, *, group_size: int) -> "Int8Weight":
        """From integers q int8 [K, N] and scale float16 [K / group_size, N], of magnitude below 4094, whose 16-fold is
        stored too; both exactly. NumPy's arrays give NumPy's."""
        xp = np if isinstance(q, np.ndarray) else jnp
        shifted = q.astype(xp.uint8) + xp.uint8(_OFFSET)  # modulo 256
        zero = xp.zeros(scale.shape, xp.uint8)
        return cls(
            Int4Weight.pack(
                xp.concatenate([shifted >> 4, shifted & 15]),
                xp.concatenate([16 * scale, scale]),
                xp.concatenate([zero + 8, zero]),
                group_size=group_size,
            )
        )

    @classmethod
    def round(cls, w, *, group_size: int) -> "Int8Weight":
        """Rounds w [K, N] to nearest, a float16 scale for group_size rows, which must divide K.

        _COLUMNS at a time: no float32 copy of a whole head is made.
        """
        k, _ = w.shape
        if k % group_size:
            raise ValueError(f"an 8-bit weight's group_size must divide its {k} rows, got {group_size}")

        def one_column(column):
            groups = column.astype(jnp.float32).reshape(-1, group_size)
            scale = (jnp.max(jnp.abs(groups), axis=1, keepdims=True) / _LIMIT).astype(jnp.float16)
            step = scale.astype(jnp.float32)
            q = jnp.round(groups / jnp.where(step > 0, step, 1.0))
            return jnp.clip(q, -_LIMIT, _LIMIT).astype(jnp.int8).ravel(), scale[:, 0]

        q, scale = (x.T for x in jax.lax.map(one_column, w.T, batch_size=_COLUMNS))  # [K, N], [G, N]
        return cls.pack(q, scale, group_size=group_size)
