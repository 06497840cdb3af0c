"""How many symbols a broadcast of K chunks to U receivers takes, each losing a symbol with its own probability.

    ARQ: a chunk is sent until every receiver has it     sum_{m >= 0} (1 - prod_u (1 - p_u^m))        a chunk
    ideal code: any K symbols are enough                 E max_u NB_u / K, NB_u = symbols until K arrive at u
    GF(256) fountain: K + excess, where the matrix of the first K is singular with probability .0039

References: J. Nonnenmacher, E. Biersack, D. Towsley, "Parity-based loss recovery for reliable multicast transmission",
IEEE/ACM Trans. Networking 1998, for both closed forms.
"""

import numpy as np

_TAIL = 1e-12


def arq_sends(loss: np.ndarray) -> float:
    """Expected sends of a chunk. loss: float [U], each in [0, 1). Every chunk is independent of the others."""
    loss = _checked(loss)
    total, m = 0.0, 0
    while True:
        missing = -np.expm1(np.sum(np.log1p(-(loss**m)))) if m else 1.0
        total += missing
        m += 1
        if missing < _TAIL:
            return total


def ideal_sends(loss: np.ndarray, num_chunks: int) -> float:
    """Expected sends of an ideal erasure code, divided by K."""
    return _expected_maximum(_checked(loss), num_chunks) / num_chunks


def fountain_sends(loss: np.ndarray, num_chunks: int) -> float:
    """Expected sends of random combinations over GF(256), divided by K: each receiver needs K + e symbols, the rank of
    K + e random rows being K with probability prod_{i > e} (1 - 256^-i). (Systematic symbols need no more than that.)
    """
    loss = _checked(loss)
    full = np.asarray([np.prod(1.0 - 256.0 ** -np.arange(e + 1, e + 12.0)) for e in range(4)])
    chance = np.diff(full, prepend=0.0)
    chance[-1] += 1.0 - full[-1]
    return _expected_maximum(loss, num_chunks, chance) / num_chunks


def _expected_maximum(loss: np.ndarray, needed: int, excess=(1.0,)) -> float:
    """E of the largest of independent numbers of symbols until needed + e arrive, e with probability excess[e]."""
    from scipy.stats import nbinom  # slow to import, and few runs plan a delivery

    total, start = float(needed), needed
    while True:
        n = np.arange(start, start + 4096)
        arrived = sum(
            chance * nbinom.cdf(n[:, None] - needed - e, needed + e, 1.0 - loss[None, :])
            for e, chance in enumerate(excess)
        )
        missing = 1.0 - np.prod(arrived, axis=1)
        total += float(missing.sum())
        if missing[-1] < _TAIL:
            return total
        start += len(n)


def _checked(loss) -> np.ndarray:
    loss = np.asarray(loss, np.float64)
    if loss.ndim != 1 or not len(loss) or np.any((loss < 0) | (loss >= 1)) or np.any(np.isnan(loss)):
        raise ValueError(f"loss must be probabilities below 1, one per receiver, got {loss}")
    return loss
