"""Low-rank matrices as products A B that are never multiplied out: sums, truncations and norms by thin QR.

    sum_c w_c A_c B_c = [w_1 A_1, ..., w_C A_C] [B_1; ...; B_C]      A B = Q_A (R_A R_B^T) Q_B^T      |A B| = |R_A B|

LoRA's parameters come as a flat dictionary: lora_a [D, R] and lora_b [R, F] of every adapted matrix, in
y = x W + scale (x A) B. All functions here are of A B, without the scale. A client of rank r < R has zeros in the
columns of A and the rows of B from r on; their gradients are zero then, dA = x^T (dy B^T) and dB = (x A)^T dy, so that
it trains r and no more.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST  # float32 products: accelerators would take fewer bits


class Pair(NamedTuple):
    """The names of one matrix's lora_a and lora_b."""

    a: str
    b: str


class Factors(NamedTuple):
    """The matrix a b. a: float32 [D, K]. b: float32 [K, F]."""

    a: jax.Array
    b: jax.Array


def pairs_of(params: dict) -> tuple[Pair, ...]:
    """The pairs among `params`, by names that end in lora_a and lora_b; other parameters are passed over.

    Raises ValueError where there are none, or where one of a pair is missing.
    """
    stems = {kind: {name.removesuffix(kind) for name in params if name.endswith(kind)} for kind in ("lora_a", "lora_b")}
    alone = stems["lora_a"] ^ stems["lora_b"]
    if alone:
        raise ValueError(f"{min(alone)}lora_a and lora_b do not both stand among the parameters")
    if not stems["lora_a"]:
        raise ValueError("the parameters have no lora_a and lora_b")
    return tuple(Pair(f"{stem}lora_a", f"{stem}lora_b") for stem in sorted(stems["lora_a"]))


def full_rank(params: dict, pairs: tuple[Pair, ...]) -> int:
    """R, the rank of all pairs as laid out. Raises ValueError where it differs, or where `params` has anything else."""
    ranks = {params[pair.a].shape[1] for pair in pairs} | {params[pair.b].shape[0] for pair in pairs}
    if len(ranks) > 1:
        raise ValueError(f"all LoRA factors must have one rank, got {sorted(ranks)}")
    others = set(params) - {name for pair in pairs for name in pair}
    if others:
        raise ValueError(f"only LoRA factors can be aggregated as products, but {min(others)} is trained too")
    return ranks.pop()


def factor_bits(params: dict, pairs: tuple[Pair, ...], rank: int = 1) -> int:
    """Exact bits of the factors at this rank, (D + F) rank numbers for each pair; `params` may be shapes only."""
    return sum(
        rank * (params[pair.a].shape[0] + params[pair.b].shape[1]) * jnp.dtype(params[pair.a].dtype).itemsize * 8
        for pair in pairs
    )


def traced_bits(params: dict, pairs: tuple[Pair, ...], rank):
    """factor_bits of an int32 rank that is known only at run time, in float32: exact up to 2^24, within 6e-8 above."""
    return jnp.float32(factor_bits(params, pairs)) * rank.astype(jnp.float32)


def keep_rank(params: dict, pairs: tuple[Pair, ...], rank) -> dict:
    """`params` with zeros in the columns of every lora_a and the rows of every lora_b from `rank` (int32) on."""
    kept = dict(params)
    for pair in pairs:
        present = jnp.arange(params[pair.a].shape[1], dtype=jnp.int32) < rank
        kept[pair.a] = jnp.where(present[None, :], params[pair.a], jnp.zeros_like(params[pair.a]))
        kept[pair.b] = jnp.where(present[:, None], params[pair.b], jnp.zeros_like(params[pair.b]))
    return kept


def has_columns(a):
    """bool [..., R]: which columns of A [..., D, R] are there, that is, are not all zeros."""
    return jnp.any(a != 0, axis=-2)


def shares_of(weights, total):
    """weights [C] / total, zeros where the total is 0."""
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 0.0)


def stack_factors(a, b, shares) -> Factors:
    """sum_c shares_c A_c B_c for A [C, D, R], B [C, R, F], shares [C]: exactly, as Factors of rank C R.

    What has share 0 is absent whatever stands in it, NaN included. The shares go into A. They are taken as they are:
    see `shares_of`.
    """
    there, scale = (shares != 0)[:, None, None], shares[:, None, None]
    a = jnp.where(there, scale * a, jnp.zeros_like(a))
    b = jnp.where(there, b, jnp.zeros_like(b))
    (num_clients, dim, rank), out_dim = a.shape, b.shape[2]
    return Factors(jnp.moveaxis(a, 0, 1).reshape(dim, num_clients * rank), b.reshape(num_clients * rank, out_dim))


def difference(first: Factors, second: Factors) -> Factors:
    """The first matrix - the second one."""
    return Factors(jnp.concatenate([first.a, second.a], axis=1), jnp.concatenate([first.b, -second.b], axis=0))


def truncated_svd(factors: Factors, rank: int) -> tuple[Factors, jax.Array]:
    """(the best approximation of this rank, all singular values in descending order [min(D, K, F)]).

    The new a has orthonormal columns and b all the singular values: directions with singular value 0 have b = 0 and
    a != 0, as fresh LoRA has, and can be trained. (A square root on either side would leave zeros in both, which no
    gradient ever leaves.) Of the two signs of a direction the one is taken that makes a's largest entry positive.
    Zeros fill up where min(D, K, F) is below the rank.
    """
    qa, ra = jnp.linalg.qr(factors.a)
    rb = jnp.linalg.qr(factors.b.T, mode="r")
    u, values, _ = jnp.linalg.svd(jnp.matmul(ra, rb.T, precision=HIGHEST), full_matrices=False)
    kept = min(rank, values.shape[0])
    u, _ = jnp.linalg.qr(u[:, :kept])  # the SVD leaves 1e-6 in u^T u - I in float32, and that would be the error of A B
    a = jnp.matmul(qa, u, precision=HIGHEST)
    b = jnp.matmul(jnp.matmul(u.T, ra, precision=HIGHEST), factors.b, precision=HIGHEST)
    largest = jnp.take_along_axis(a, jnp.argmax(jnp.abs(a), axis=0)[None], axis=0)
    sign = jnp.where(largest < 0, jnp.float32(-1), jnp.float32(1))
    missing = rank - kept
    return Factors(jnp.pad(sign * a, ((0, 0), (0, missing))), jnp.pad(sign.T * b, ((0, missing), (0, 0)))), values


def factored_norm(factors: Factors):
    """The Frobenius norm |a b|. Through QR and not through Gram matrices, whose squares cancel: a difference of equal
    matrices comes out near 1e-7 of their norm, not near 1e-4."""
    r = jnp.linalg.qr(factors.a, mode="r")
    return jnp.linalg.norm(jnp.matmul(r, factors.b, precision=HIGHEST))


def joint_norm(matrices: list[Factors]):
    """The Frobenius norm of several matrices together."""
    return jnp.linalg.norm(jnp.stack([factored_norm(factors) for factors in matrices]))


def relative_distance(first: list[Factors], second: list[Factors]):
    """|first - second| / |second| over several matrices together; 0 where second is."""
    distance = joint_norm([difference(one, other) for one, other in zip(first, second, strict=True)])
    return ratio(distance, joint_norm(second))


def ratio(distance, norm):
    """distance / norm, and 0 where the norm is: metrics of an empty cohort are finite."""
    return jnp.where(norm > 0, distance / jnp.where(norm > 0, norm, 1.0), 0.0)
