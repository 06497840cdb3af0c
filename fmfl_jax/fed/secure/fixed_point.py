"""Updates as integers modulo 2^m, so that sums of masked ones are exact (Bonawitz et al., CCS 2017, section 7).

    q = round(clip(x, -c, c) / step) mod 2^m,   step = c / (2^(b-1) - 1),   m = b + ceil(log2 max_clients)

Stochastic rounding, up with a probability of the fraction, is unbiased with few bits too (QSGD, Alistarh et al., 2017).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from fmfl_jax.finite import finite_fields

WEIGHT_BITS = 24  # of a client's denominator, sent as an integer beside its values: as many as float32 holds


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class FixedPoint:
    """clip: values beyond +-clip saturate. bits: of one value, its sign included. max_clients: whose sum must fit.
    stochastic: unbiased rounding with a key; otherwise to the nearest, halves to even.

    Raises ValueError where the sum of max_clients values could overflow uint32, and for settings out of range. More
    than 24 bits would say nothing: float32 has no more.
    """

    clip: float
    bits: int
    max_clients: int
    stochastic: bool = False

    def __post_init__(self):
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise ValueError(f"clip must be positive and finite, got {self.clip}")
        if not 2 <= self.bits <= 24:
            raise ValueError(f"bits must be in 2..24, got {self.bits}")
        if self.max_clients < 1:
            raise ValueError(f"max_clients must be >= 1, got {self.max_clients}")
        if self.modulus_bits > 32:
            raise ValueError(
                f"the sum of {self.max_clients} values of {self.bits} bits needs {self.modulus_bits} bits "
                f"and could overflow uint32: take at most {self.bits - self.modulus_bits + 32} bits"
            )

    @property
    def modulus_bits(self) -> int:
        """m: also the payload of one value, since a masked value is uniform and cannot be compressed."""
        return self.bits + (self.max_clients - 1).bit_length()

    @property
    def capacity(self) -> int:
        """How many clients' sum fits: max_clients, rounded up to a power of two."""
        return 2 ** (self.modulus_bits - self.bits)

    @property
    def largest(self) -> int:
        """The integer that stands for `clip`."""
        return 2 ** (self.bits - 1) - 1

    @property
    def step(self) -> float:
        return self.clip / self.largest

    @property
    def num_limbs(self) -> int:
        """Into how many integers of `bits` bits a denominator is cut."""
        return -(-WEIGHT_BITS // self.bits)


def vector_size(codec: FixedPoint, template) -> int:
    """Integers that a client sends for a tree like the template: its values, then its denominator."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(template)) + codec.num_limbs


def payload_bits(codec: FixedPoint, template) -> int:
    """Exact bits of a masked message, without the keys and shares of the protocol (see ProtocolResult)."""
    return vector_size(codec, template) * codec.modulus_bits


def rounding_norm(codec: FixedPoint, template) -> float:
    """How much rounding can add to a message's L2 norm, in the units of what is encoded.

    Noise for differential privacy must cover a norm of (clipping norm + this): step sqrt(n) / 2 to the nearest, step
    sqrt(n) for stochastic rounding.
    """
    num_values = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(template))
    return codec.step * math.sqrt(num_values) * (1.0 if codec.stochastic else 0.5)


def encode(codec: FixedPoint, tree, share, denominator, key):
    """(uint32 [n], clipped): `share` times the tree's values, leaf after leaf, and then the denominator.

    tree: floats. share: float32 scalar in [0, 1], the client's weight / the largest weight; beyond that it saturates,
    and 0 gives zeros. denominator: likewise, what the client adds to the denominator of the mean. key: for stochastic
    rounding. clipped: float32, the share of values that saturated; what is not finite is among them, nan counts as 0.
    """
    zero, one = jnp.float32(0.0), jnp.float32(1.0)
    share, denominator = jnp.clip(share, zero, one), jnp.clip(denominator, zero, one)
    values = jnp.concatenate([leaf.reshape(-1).astype(jnp.float32) for leaf in jax.tree.leaves(tree)])
    values = jnp.where(share > 0, share * values, 0.0)
    clipped = jnp.mean((~(jnp.abs(values) <= jnp.float32(codec.clip))).astype(jnp.float32))
    scaled = jnp.where(jnp.isnan(values), 0.0, values) / jnp.float32(codec.step)
    scaled = jnp.clip(scaled, -jnp.float32(codec.largest), jnp.float32(codec.largest))
    if codec.stochastic:
        # Not floor(x + u): of a large x the sum would lose the low bits of u.
        low = jnp.floor(scaled)
        rounded = low + (jax.random.uniform(key, scaled.shape) < scaled - low).astype(jnp.float32)
    else:
        rounded = jnp.round(scaled)
    integers = jax.lax.bitcast_convert_type(rounded.astype(jnp.int32), jnp.uint32) & _mask(codec)
    whole = jnp.where(share > 0, jnp.round(denominator * jnp.float32(2**WEIGHT_BITS - 1)), 0.0).astype(jnp.uint32)
    shifts = jnp.arange(codec.num_limbs, dtype=jnp.uint32) * jnp.uint32(codec.bits)
    return jnp.concatenate([integers, (whole >> shifts) & jnp.uint32(2**codec.bits - 1)]), clipped


def modular_sum(codec: FixedPoint, encoded):
    """uint32 [C, n] -> [n], exact whatever the order. ValueError for more clients than the codec has room for."""
    if encoded.shape[0] > codec.capacity:
        raise ValueError(
            f"the sum of {encoded.shape[0]} clients (padding included) could overflow: the codec is for "
            f"max_clients={codec.max_clients}"
        )
    return jnp.sum(encoded, axis=0, dtype=jnp.uint32) & _mask(codec)


def decode(codec: FixedPoint, total, template):
    """A modular sum, uint32 [n] -> (tree like the template, sum of share x values; float32, of denominators)."""
    num_values = vector_size(codec, template) - codec.num_limbs
    unused = 32 - codec.modulus_bits  # the sign stands below these: up and down again extends it
    shifted = total[:num_values] << jnp.uint32(unused)
    signed = jax.lax.bitcast_convert_type(shifted, jnp.int32) >> jnp.int32(unused)
    flat = signed.astype(jnp.float32) * jnp.float32(codec.step)
    leaves, offset = [], 0
    for leaf in jax.tree.leaves(template):
        size = math.prod(leaf.shape)
        leaves.append(flat[offset : offset + size].reshape(leaf.shape).astype(leaf.dtype))
        offset += size
    powers = jnp.asarray([2.0 ** (codec.bits * i) for i in range(codec.num_limbs)], jnp.float32)
    denominator = jnp.sum(total[num_values:].astype(jnp.float32) * powers) / jnp.float32(2**WEIGHT_BITS - 1)
    return jax.tree.unflatten(jax.tree.structure(template), leaves), denominator


def _mask(codec: FixedPoint):
    return jnp.uint32(2**codec.modulus_bits - 1)
