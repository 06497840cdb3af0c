"""Attacks on a federated round, to test defences with: by the update, and by the data.

    sign flip          m_c <- -factor m_c
    scaling            m_c <- factor m_c                 (model replacement: Bagdasaryan et al., AISTATS 2020)
    ALIE               m_c <- mean - z std               (Baruch et al., "A Little Is Enough", NeurIPS 2019)
    inner product      m_c <- -epsilon mean              (Xie et al., "Fall of Empires", UAI 2020)
    Gaussian           m_c <- std N(0, I)                (Blanchard et al., NeurIPS 2017)

mean and std are the benign clients', coordinate by coordinate: the attackers know everything and act as one. An update
is a delta, server - client, which is a pseudo-gradient: the server moves against it. These are linear, so in terms of
the client's movement -delta the formulas of sign flip, scaling and inner product read the same, and ALIE's has + z std.

An update attack is attack(GatheredUpdates, malicious bool [C], key) -> updates. The rows of benign and absent clients
stay. Data attacks are functions on numpy arrays, used before the batches are made.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax import streams
from fmfl_jax.fed.core.types import Attack, GatheredUpdates
from fmfl_jax.fed.shares import positive_count


def malicious_clients(num_clients: int, fraction: float, seed: int) -> np.ndarray:
    """Who attacks: bool [num_clients] with the nearest whole number to fraction * num_clients true, drawn by the seed.

    For one seed, a larger fraction has all the attackers of a smaller one. Raises ValueError unless 0 <= fraction <= 1,
    and where a fraction above 0 makes no attacker.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"the fraction of malicious clients must be in [0, 1], got {fraction}")
    order = streams.host_rng(streams.MALICIOUS, seed).permutation(num_clients)
    malicious = np.zeros(num_clients, bool)
    malicious[order[: positive_count(fraction, num_clients, "attackers")]] = True
    return malicious


def sign_flip(factor: float = 1.0) -> Attack:
    """Each malicious client sends -factor times its honest update."""
    return _changes(lambda update: -factor * update)


def scaling(factor: float) -> Attack:
    """Each malicious client sends factor times its honest update.

    With factor = (sum of weights) / (the attacker's weight) one attacker replaces the model by the one it trained, once
    the others have converged; it does harm where that client's data are poisoned or unlike the others'.
    """
    return _changes(lambda update: factor * update)


def alie(z: float | None = None) -> Attack:
    """A Little Is Enough: all malicious clients send mean - z std of the benign ones, small enough to look honest.

    z: None is the published choice for n present clients with m malicious among them, the largest shift that still
    leaves s benign clients further out, enough for a majority:  s = floor(n / 2 + 1) - m,
    z = Phi^-1((n - m - s) / (n - m)). With few attackers that is 0 or negative (n = 10, m = 2 gives exactly 0); it is
    kept within [0, Phi^-1(0.9999)]. Those who want an effect there give a z. std divides by the number of benign.
    """

    def attack(gathered: GatheredUpdates, malicious, key):
        del key
        benign, sending = _sides(gathered, malicious)
        if z is None:
            num_benign, num_malicious = (jnp.sum(x.astype(jnp.float32)) for x in (benign, sending))
            supporters = jnp.floor((num_benign + num_malicious) / 2.0 + 1.0) - num_malicious
            below = (num_benign - supporters) / jnp.maximum(num_benign, 1.0)
            shift = jax.scipy.special.ndtri(jnp.clip(below, 0.5, 0.9999))
        else:
            shift = jnp.float32(z)

        def one(leaf):
            mean = _mean(leaf, benign)
            std = jnp.sqrt(_mean(jnp.square(leaf.astype(jnp.float32) - mean[None]), benign))
            return _replaced(leaf, (mean - shift * std)[None], sending)

        return jax.tree.map(one, gathered.updates)

    return attack


def inner_product(epsilon: float) -> Attack:
    """All malicious clients send -epsilon times the benign mean, so that the inner product of the update with the true
    one turns negative. Against the plain mean of equal weights that takes epsilon > (n - m) / m; a small epsilon, which
    stays near the honest updates, is what defeats Krum and the median."""

    def attack(gathered: GatheredUpdates, malicious, key):
        del key
        benign, sending = _sides(gathered, malicious)
        return jax.tree.map(
            lambda leaf: _replaced(leaf, -epsilon * _mean(leaf, benign)[None], sending), gathered.updates
        )

    return attack


def gaussian(std: float) -> Attack:
    """Each malicious client sends independent noise N(0, std^2) in place of its update."""

    def attack(gathered: GatheredUpdates, malicious, key):
        _, sending = _sides(gathered, malicious)
        leaves, structure = jax.tree.flatten(gathered.updates)
        keys = jax.vmap(lambda client: jax.random.split(jax.random.fold_in(key, client), len(leaves)))(
            gathered.client_ids
        )
        noise = [
            std * jax.vmap(lambda k, x: jax.random.normal(k, x.shape, jnp.float32))(keys[:, i], x)
            for i, x in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, [_replaced(x, n, sending) for x, n in zip(leaves, noise)])

    return attack


def flip_labels(labels: np.ndarray, malicious: np.ndarray, num_classes: int) -> np.ndarray:
    """The malicious clients' labels become num_classes - 1 - label.

    labels: integers [C, ...] in [0, num_classes). malicious: bool [C], or a bool for all of the array. Returns a new
    array. Raises ValueError for labels out of range.
    """
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(f"labels must be in [0, {num_classes}), got {labels.min()} to {labels.max()}")
    return np.where(_beside(malicious, labels), num_classes - 1 - labels, labels).astype(labels.dtype)


def permute_vocabulary(tokens: np.ndarray, malicious: np.ndarray, vocab_size: int, seed: int) -> np.ndarray:
    """The malicious clients' text in a cipher: every token replaced by its image under one fixed random permutation.

    The label flip of a language model: the next tokens to be predicted are the wrong ones, the same for all attackers.
    (A window of tokens is input and target at once, so the inputs are in the cipher too.)

    tokens: integers [C, ...] in [0, vocab_size). malicious: bool [C], or a bool for all. Returns a new array. Raises
    ValueError for tokens out of range.
    """
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(f"tokens must be in [0, {vocab_size}), got {tokens.min()} to {tokens.max()}")
    permutation = streams.host_rng(streams.VOCABULARY, seed).permutation(vocab_size)
    return np.where(_beside(malicious, tokens), permutation[tokens], tokens).astype(tokens.dtype)


def _changes(change: Callable[[jax.Array], jax.Array]) -> Attack:
    """The attack in which each malicious client changes its update."""

    def attack(gathered: GatheredUpdates, malicious, key):
        del key
        _, sending = _sides(gathered, malicious)
        return jax.tree.map(lambda leaf: _replaced(leaf, change(leaf.astype(jnp.float32)), sending), gathered.updates)

    return attack


def _sides(gathered: GatheredUpdates, malicious):
    """(benign, sending): bool [C] each, the present clients of the two sides."""
    present = gathered.weights > 0
    return present & ~malicious, present & malicious


def _beside(mask, array):
    """A mask [C] (or a scalar) with the axes to stand beside an array [C, ...]."""
    mask = np.asarray(mask)
    return mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim))


def _mean(leaf, chosen):
    """Mean over the chosen rows in float32: [C, ...] -> [...]; zeros where nobody is chosen."""
    mask = chosen.reshape(-1, *(1,) * (leaf.ndim - 1))
    count = jnp.maximum(jnp.sum(chosen.astype(jnp.float32)), 1.0)
    return jnp.sum(jnp.where(mask, leaf.astype(jnp.float32), 0.0), axis=0) / count


def _replaced(leaf, values, sending):
    """The leaf [C, ...] with the rows of those who attack taken from values [C or 1, ...]."""
    mask = sending.reshape(-1, *(1,) * (leaf.ndim - 1))
    return jnp.where(mask, values.astype(leaf.dtype), leaf)
