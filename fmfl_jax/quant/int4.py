"""Int4Weight: a [K, N] weight matrix in packed 4-bit integers, the type that a quantized model computes with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels.w4a16 import layout, reference


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int4Weight:
    """W[k, n] ~ (q[k, n] - zero_point[k // group_size, n]) * scale[k // group_size, n].

    Where zero_point is a float array it holds the groups' minima instead (GGUF's Q4_1: a zero point that is no
    integer): W[k, n] ~ q[k, n] * scale[k // group_size, n] + zero_point[k // group_size, n].

    Invariants:
      - q and integer zero points are 0..15, packed by `kernels.w4a16.layout` (which says the order of the nibbles);
        float minima are [G, Np] as the scales are. The Triton kernels take integer zero points only.
      - groups run along the input dimension K; the last one is short where group_size does not divide K.
      - shape (K, N) and group_size are static: they are part of the tree's structure, so a jitted function is
        compiled for them.
      - activation_bits (16 or 8) is what a CPU's kernel rounds the other factor to; static too, not stored in files.
      - it holds no gradient: `quant.linear.matmul` differentiates through x only.
    """

    qweight: jax.Array | np.ndarray
    scale: jax.Array | np.ndarray
    zero_point: jax.Array | np.ndarray
    shape: tuple[int, int] = dataclasses.field(metadata=dict(static=True))
    group_size: int = dataclasses.field(metadata=dict(static=True))
    activation_bits: int = dataclasses.field(default=16, metadata=dict(static=True))

    @property
    def has_minima(self) -> bool:
        """Whether zero_point holds minima."""
        return layout.is_minimum(self.zero_point)

    @property
    def nbytes(self) -> int:
        """Bytes held, padding included."""
        return self.qweight.nbytes + self.scale.nbytes + self.zero_point.nbytes

    @classmethod
    def pack(cls, q, scale, zero_point, *, group_size: int) -> "Int4Weight":
        """From integers q [K, N] (0..15), zero_point [G, N] (integers 0..15, or float minima) and scale [G, N];
        group_size -1 is one group of K."""
        group_size = q.shape[0] if group_size == -1 else group_size
        qweight, scale, zero_point = layout.pack(q, zero_point, scale, group_size=group_size)
        return cls(qweight, scale, zero_point, tuple(q.shape), group_size)

    def unpack(self):
        """q [K, N], scale [G, N], zero_point [G, N], as given to `pack`."""
        k, n = self.shape
        q, zero_point = layout.unpack(self.qweight, self.zero_point, k=k, n=n, group_size=self.group_size)
        return q, self.scale[:, :n], zero_point

    def columns(self, index):
        """As `unpack`, of the columns int32 [T] alone: q [K, T], scale [G, T], zero_point [G, T]."""
        k, n = self.shape
        arrays = self.qweight, self.scale, self.zero_point
        return layout.take_columns(*arrays, index, k=k, n=n, group_size=self.group_size)

    def dequantize(self, dtype=jnp.float32):
        """The matrix [K, N] that this stands for."""
        k, n = self.shape
        return reference.dequantize(
            self.qweight, self.scale, self.zero_point, k=k, n=n, group_size=self.group_size, dtype=dtype
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int4Layers:
    """One matrix of all layers, [K, N] each: the one that counts is that of `layer`, int32 []."""

    weights: tuple[Int4Weight, ...]
    layer: jax.Array


def with_activation_bits(params, bits: int):
    """The tree `params` whose Int4Weights have their products on a CPU made with activations of `bits` (16 or 8) bits.

    8 is faster where arithmetic and not memory takes the time; its error is 6e-3 of a product, that of 16 is 2e-5
    (`kernels.w4a16.cpu.product`).
    """

    def replaced(leaf):
        return dataclasses.replace(leaf, activation_bits=bits) if isinstance(leaf, Int4Weight) else leaf

    return jax.tree.map(replaced, params, is_leaf=lambda leaf: isinstance(leaf, Int4Weight))
