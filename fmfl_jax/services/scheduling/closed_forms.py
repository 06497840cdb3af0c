"""What queues wait on average with Poisson arrivals, where theory knows it. M/G/1, first come first served, is
`latency.mg1_wait_s`.

Classes and distributions come with E[S] and E[S^2]; load is rate * E[S]. All raise ValueError, with the load, for a
queue that has no steady state.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import integrate, stats

from fmfl_jax.services.checks import at_least, positive, same_length, vector
from fmfl_jax.services.scheduling.requests import check_load

_NODES = 20_001  # of the integrals over the distribution of the work
_TAIL = 1e-13  # of the work that they leave out


def erlang_c(num_servers: int, load: float) -> float:
    """Probability that a request waits in M/M/c. load: rate * E[S], in Erlang (A. K. Erlang, 1917)."""
    at_least(1, num_servers=num_servers)
    at_least(0, load=load)
    check_load(load / num_servers)
    blocked = 1.0  # Erlang B by its recursion, which does not overflow
    for servers in range(1, num_servers + 1):
        blocked = load * blocked / (servers + load * blocked)
    return blocked / (1 - load / num_servers * (1 - blocked))


def mmc_wait_s(rate_per_s: float, mean_s: float, num_servers: int) -> float:
    """Mean wait in M/M/c, s."""
    load = rate_per_s * mean_s
    return erlang_c(num_servers, load) * mean_s / (num_servers - load)


def priority_waits_s(rates_per_s: ArrayLike, means_s: ArrayLike, second_moments_s2: ArrayLike) -> np.ndarray:
    """[classes] mean waits of M/G/1 by priority without preemption, the first class first (Cobham, 1954):
    W_k = W0 / ((1 - sigma_{k-1}) (1 - sigma_k)), W0 = sum rate E[S^2] / 2, sigma_k the load of classes up to k."""
    before, load, residual_s = _classes(rates_per_s, means_s, second_moments_s2)
    return residual_s[-1] / ((1 - before) * (1 - load))


def preemptive_sojourns_s(rates_per_s: ArrayLike, means_s: ArrayLike, second_moments_s2: ArrayLike) -> np.ndarray:
    """[classes] mean times from arrival to end of M/G/1 by priority with preemption, work resumed: T_k =
    E[S_k] / (1 - sigma_{k-1}) + R_k / ((1 - sigma_{k-1}) (1 - sigma_k)), R_k as W0 of the classes up to k."""
    before, load, residual_s = _classes(rates_per_s, means_s, second_moments_s2)
    return np.asarray(means_s) / (1 - before) + residual_s / ((1 - before) * (1 - load))


def conserved_wait_s(rates_per_s: ArrayLike, means_s: ArrayLike, second_moments_s2: ArrayLike) -> float:
    """sum rho_k W_k of M/G/1, the same under any order that neither idles nor preempts nor knows the work: rho W0 /
    (1 - rho) (Kleinrock, 1965)."""
    _, load, residual_s = _classes(rates_per_s, means_s, second_moments_s2)
    return float(load[-1] * residual_s[-1] / (1 - load[-1]))


def shortest_first_wait_s(rate_per_s: float, work: Any) -> float:
    """Mean wait of M/G/1, shortest job first without preemption (Phipps, 1956): W(x) = W0 / (1 - rho(x))^2 with rho(x)
    the load of jobs up to x. work: a continuous scipy distribution, s."""
    x, density, load, second = _by_size(rate_per_s, work)
    wait_s = rate_per_s * second[-1] / 2 / (1 - load) ** 2
    return float(integrate.simpson(wait_s * density, x=x))


def srpt_sojourn_s(rate_per_s: float, work: Any) -> float:
    """Mean time from arrival to end of M/G/1 with the shortest remaining work first (Schrage & Miller, 1966):
    T(x) = rate (int_0^x t^2 f + x^2 P(S > x)) / (2 (1 - rho(x))^2) + int_0^x dt / (1 - rho(t))."""
    x, density, load, second = _by_size(rate_per_s, work)
    waits_s = rate_per_s * (second + x**2 * work.sf(x)) / 2 / (1 - load) ** 2
    served_s = x[0] + integrate.cumulative_simpson(1 / (1 - load), x=x, initial=0)  # below x[0] nobody interrupts
    return float(integrate.simpson((waits_s + served_s) * density, x=x))


class BatchServer(NamedTuple):
    """Mean batch, its mean time from arrival to end, and the two bounds on that which need no chain, s."""

    mean_batch: float
    sojourn_s: float
    bound_light_s: float
    bound_heavy_s: float


def batch_server(rate_per_s: float, *, batch_s: float, row_s: float) -> BatchServer:
    """The server that takes all who wait for t0 + alpha b (Inoue, Performance Evaluation 2021), t0 = batch_s, alpha =
    row_s. E[B] is of the chain b -> max(1, Poisson(l (alpha b + t0))), solved up to where 1e-12 is left; the bounds
    take E[B] = 1 and E[B] = l t0 / (1 - l alpha), which it exceeds."""
    positive(rate_per_s=rate_per_s)
    at_least(0, batch_s=batch_s, row_s=row_s)
    check_load(rate_per_s * row_s)
    scale = rate_per_s * row_s
    heavy = rate_per_s * batch_s / (1 - scale)
    size = int(heavy + 12 * math.sqrt((heavy + 1) / (1 - scale**2)) + 30)
    sizes = np.arange(1, size + 1)
    arrive = rate_per_s * (row_s * sizes + batch_s)
    chain = stats.poisson.pmf(sizes[None], arrive[:, None])  # [from, to]
    chain[:, 0] += np.exp(-arrive)
    chain /= chain.sum(axis=1, keepdims=True)
    system = np.vstack([chain.T - np.eye(size), np.ones(size)])
    share = np.linalg.lstsq(system, np.append(np.zeros(size), 1.0))[0]
    mean_batch = float(share @ sizes)

    def sojourn_s(mean_batch):
        half = 1 / (2 * rate_per_s)
        spread = rate_per_s**2 * (2 * row_s * batch_s + batch_s**2 / mean_batch)
        return (row_s + half) * (1 + spread) / (1 - scale**2) + batch_s - half

    return BatchServer(mean_batch, sojourn_s(mean_batch), sojourn_s(1.0), sojourn_s(max(heavy, 1e-300)))


def _classes(rates_per_s, means_s, second_moments_s2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each class: the load of those before it, with its own, and the residual work sum rate E[S^2] / 2 up to it."""
    rates = vector("rates_per_s", rates_per_s)
    means, seconds = vector("means_s", means_s), vector("second_moments_s2", second_moments_s2)
    same_length(rates_per_s=rates, means_s=means, second_moments_s2=seconds)
    load = np.cumsum(rates * means)
    check_load(float(load[-1]))
    return np.concatenate([[0.0], load[:-1]]), load, np.cumsum(rates * seconds) / 2


def _by_size(rate_per_s: float, work: Any):
    """Nodes x over the work's range, its density there, the load of jobs up to x, and int_0^x t^2 f."""
    positive(rate_per_s=rate_per_s)
    check_load(rate_per_s * work.mean())
    x = np.linspace(work.ppf(0), work.ppf(1 - _TAIL), _NODES)
    density = work.pdf(x)
    load = rate_per_s * integrate.cumulative_simpson(x * density, x=x, initial=0)
    return x, density, load, integrate.cumulative_simpson(x**2 * density, x=x, initial=0)
