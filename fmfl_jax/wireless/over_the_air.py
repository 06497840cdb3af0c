"""Over-the-air computation: all clients transmit at once and the channel adds their updates up.

Optimal power control: Cao, Zhu, Xu, Huang, IEEE TWC 2020. Truncated channel inversion: Zhu, Wang, Huang,
arXiv 1812.11494 (IEEE TWC 2020). The estimate is the plain mean over clients: the channel knows no weights, so scale
the updates first where a weighted mean is wanted.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fmfl_jax.wireless import special


def optimal_denoising(power_w, amplitude_gain, noise_w):
    """eta* = min_k ((sigma^2 + sum_{i<=k} P_i h_i^2) / sum_{i<=k} sqrt(P_i) h_i)^2, clients sorted by P h^2.

    Args:
      power_w: [C] power budgets P.
      amplitude_gain: [C] |h|.
      noise_w: sigma^2, scalar.

    Returns:
      scalar eta: the received sum is divided by sqrt(eta).
    """
    strength = jnp.sort(jnp.sqrt(power_w) * amplitude_gain)
    candidates = (noise_w + jnp.cumsum(jnp.square(strength))) / jnp.maximum(jnp.cumsum(strength), 1e-30)
    return jnp.square(jnp.min(candidates))


def transmit_amplitude(power_w, amplitude_gain, eta):
    """b_k = min(sqrt(P_k), sqrt(eta) / h_k): channel inversion where the budget allows it, full power elsewhere.
    [C]."""
    return jnp.minimum(jnp.sqrt(power_w), jnp.sqrt(eta) / jnp.maximum(amplitude_gain, 1e-30))


class Truncation(NamedTuple):
    """receive_power_w: [C] rho_0, the power every untruncated symbol arrives with; silence: [] probability of
    silence."""

    receive_power_w: jax.Array
    silence: jax.Array


def truncated_inversion(power_w, power_gain, threshold) -> Truncation:
    """Truncated channel inversion over Rayleigh fades: invert above |h|^2 = g_th, keep silent below.

    rho_0 = P_0 / (PL E1(g_th)) spends the budget on average, since E[1/|h|^2; |h|^2 > g_th] = E1(g_th).

    Args:
      power_w: [C] average power budgets.
      power_gain: [C] 1/PL.
      threshold: g_th > 0, scalar.
    """
    return Truncation(
        power_w * power_gain / (special.scaled_exp1(threshold) * jnp.exp(-threshold)), -jnp.expm1(-threshold)
    )


def _normalize(deltas):
    """Divides by the largest client rms (one scalar of side information), so that symbols have power <= 1."""
    leaves = jax.tree.leaves(deltas)
    count = sum(leaf[0].size for leaf in leaves)
    square = sum(jnp.sum(jnp.square(leaf.reshape(leaf.shape[0], -1).astype(jnp.float32)), axis=1) for leaf in leaves)
    scale = jnp.max(jnp.sqrt(square / count))
    return jnp.where(scale > 0.0, scale, 1.0)


def _leaf_keys(key, tree):
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))


def aircomp_mean(key, deltas, power_w, amplitude_gain, noise_w):
    """The mean of the clients' updates as heard over the air, with optimal power control.

    Args:
      key: PRNG key of the receiver noise.
      deltas: pytree of [C, ...].
      power_w, amplitude_gain: [C]; noise_w: scalar noise power per symbol.

    Returns:
      (pytree of [...], eta). Without noise and with equal enough channels this is the exact mean up to rounding.
    """
    num_clients = power_w.shape[0]
    eta = optimal_denoising(power_w, amplitude_gain, noise_w)
    received = amplitude_gain * transmit_amplitude(power_w, amplitude_gain, eta) / jnp.sqrt(eta)  # [C]
    scale = _normalize(deltas)

    def hear(leaf, key):
        weight = received.reshape((-1,) + (1,) * (leaf.ndim - 1)).astype(leaf.dtype)
        noise = jax.random.normal(key, leaf.shape[1:], jnp.float32) * (jnp.sqrt(noise_w / eta) * scale)
        return (jnp.sum(weight * leaf, axis=0) + noise.astype(leaf.dtype)) / num_clients

    return jax.tree.map(hear, deltas, _leaf_keys(key, deltas)), eta


def truncated_mean(key, deltas, power_w, power_gain, noise_w, threshold, client_ids):
    """The mean over the air with truncated inversion and an independent Rayleigh fade for each client and symbol.

    All symbols are aligned to the weakest client's rho_0. A symbol that a client does not send counts as 0, and the sum
    is divided by C (1 - silence): unbiased over the fades.

    Args: as in `aircomp_mean`, with power_gain [C] = 1/PL, the threshold g_th, and client_ids int [C], which the fades
      are drawn for, whatever the order of the clients.
    """
    num_clients = power_w.shape[0]
    plan = truncated_inversion(power_w, power_gain, threshold)
    receive = jnp.min(plan.receive_power_w)
    scale = _normalize(deltas)

    def hear(leaf, key):
        k_fade, k_noise = jax.random.split(key)
        draw = lambda client: jax.random.uniform(jax.random.fold_in(k_fade, client), leaf.shape[1:])
        sent = jax.vmap(draw)(client_ids) >= plan.silence
        noise = jax.random.normal(k_noise, leaf.shape[1:], jnp.float32) * (jnp.sqrt(noise_w / receive) * scale)
        heard = jnp.sum(jnp.where(sent, leaf, jnp.zeros_like(leaf)), axis=0) + noise.astype(leaf.dtype)
        return heard / (num_clients * (1.0 - plan.silence)).astype(leaf.dtype)

    return jax.tree.map(hear, deltas, _leaf_keys(key, deltas))
