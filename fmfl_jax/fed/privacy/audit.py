"""An empirical audit: how much a membership attack learns of one client, against what the accountant allows.

    any (epsilon, delta)-private release, any test:   P[positive | in] <= e^epsilon P[positive | out] + delta

A canary client sends a large update in a fixed direction. Many independent runs, half of them without it, are told
apart by the part of the released updates in that direction; the rates of true and false positives give a lower bound on
epsilon (Jagielski et al., NeurIPS 2020; Nasr et al., IEEE S&P 2021) with Clopper-Pearson confidence. A lower bound
above the accountant's epsilon proves a defect: noise that is missing or too small, a clip that does not hold, weights
that let one client count for more. A lower bound below it proves nothing; the attack may be weak.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmfl_jax import streams
from fmfl_jax.fed.algorithms.fed_opt import FED_AVG, server_step, start_server
from fmfl_jax.fed.core.round import make_round
from fmfl_jax.fed.core.types import Aggregator, ClientResult, ClientUpdate, Cohort, FederatedAlgorithm, Phase
from fmfl_jax.parallel import AXIS

_CANARY_SIZE = 100.0  # the canary's update by the size of the others': only clipping holds it back
_LEARNING_RATE = 0.1


class AuditResult(NamedTuple):
    """epsilon: lower bound at the given confidence, 0 where the attack tells nothing. true_positives, false_positives:
    rates on the runs that the bound was computed from. threshold: of the score. above: a positive is "in", at or above
    it; otherwise a positive is "out", below it, and the inequality is used with in and out exchanged."""

    epsilon: float
    true_positives: float
    false_positives: float
    threshold: float
    above: bool


def canary_scores(
    aggregator: Aggregator,
    *,
    num_runs: int,
    num_clients: int,
    sampling_rate: float,
    rounds: int,
    num_values: int = 8,
    scalar_share: float = 0.5,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the attack on runs without the canary and with it: float32 [num_runs] each.

    Every run is `rounds` rounds of fed/core/round.py with this aggregator: num_clients clients minimize quadratics
    1/2 ||params - a_c||^2 with optima of their own, one step each, and hold 1 to 50 examples; the canary holds 1000.
    Clients take part with probability sampling_rate. The parameters are a vector of num_values and a scalar. The score
    is the sum over rounds of <released update, direction>.
    scalar_share: how much of the direction's squared norm is in the scalar. 0 and 1 ask of one leaf alone, whose noise
      the other's would blur.
    """
    rng = streams.host_rng(streams.AUDIT, seed, num_runs, num_clients)
    num_all = num_clients + 1  # the last is the canary
    optima = {"w": rng.normal(size=(num_all, num_values)), "b": rng.normal(size=num_all)}
    direction = {"w": np.eye(num_values)[0] * math.sqrt(1 - scalar_share), "b": np.sqrt(scalar_share)}
    optima, direction = jax.tree.map(jnp.float32, (optima, direction))
    num_examples = np.append(rng.integers(1, 50, num_clients), 1000).astype(np.float32)
    weights = jnp.asarray(num_examples if aggregator.weighting is None else aggregator.weighting(num_examples))
    delivered = rng.random((2, num_runs, rounds, num_all)) < sampling_rate
    delivered[0, :, :, -1] = False
    audited = make_round(_one_canary(direction, num_clients), aggregator=aggregator)
    one_device = jax.vmap(audited.spmd, in_axes=(None, None, 0), axis_name=AXIS)
    batches = jax.tree.map(lambda x: x[:, None], optima)  # one step each

    def one_run(seed, delivered):
        def one_round(state, delivered):
            present = jnp.where(delivered, weights, 0.0)
            cohort = Cohort(jnp.arange(num_all, dtype=jnp.int32), present, batches, present, delivered=delivered)
            state = one_device(state, (), jax.tree.map(lambda x: x[None], cohort))[0]
            return jax.tree.map(lambda x: x[0], state), None

        start = audited.init(optax.tree.zeros_like(direction), 0)._replace(seed=seed)
        end, _ = jax.lax.scan(one_round, start, delivered)
        moved = jax.tree.map(lambda a, b, d: jnp.sum((a - b) * d), start.params, end.params, direction)
        return moved["w"] + moved["b"]

    seeds = np.random.SeedSequence(seed).generate_state(2 * num_runs).astype(np.uint32)
    scores = jax.jit(jax.vmap(one_run))(
        jnp.asarray(seeds), jnp.asarray(delivered.reshape(2 * num_runs, rounds, num_all))
    )
    without, with_canary = np.asarray(scores).reshape(2, num_runs)
    return without, with_canary


def _one_canary(direction, canary: int) -> FederatedAlgorithm:
    """Clients that take one step to their optimum, their batch; the client of this number sends the direction."""

    def step(context, work, optimum, key):
        del work, key
        benign = optax.tree.scale(_LEARNING_RATE, optax.tree.sub(context.message, optimum))
        large = optax.tree.scale(_CANARY_SIZE, direction)
        update = jax.tree.map(lambda a, b: jnp.where(context.client_id == canary, a, b), large, benign)
        return update, {"loss": jnp.float32(0.0)}

    def finish(context, update, metrics):
        return ClientResult(update, context.weight, (), metrics)

    return FederatedAlgorithm(
        init=lambda params, seed: start_server(FED_AVG, params, seed),
        client=ClientUpdate(begin=lambda context: context.message, phases=(Phase(step=step),), finish=finish),
        server=lambda state, aggregate: server_step(FED_AVG, state, aggregate),
    )


def epsilon_lower_bound(
    without: np.ndarray, with_canary: np.ndarray, *, delta: float, confidence: float = 0.95
) -> AuditResult:
    """A lower bound of epsilon, which holds with this confidence, from scores [num_runs] of either kind.

    The threshold is chosen on the first half of the runs and the rates are counted on the second: chosen on the same
    runs the confidence would not hold. With n runs in each half the bound cannot exceed about ln(n / 3.7).
    """
    half = len(without) // 2
    if half < 1 or len(with_canary) != len(without):
        raise ValueError("expected as many scores with the canary as without it, at least 2")
    candidates = np.unique(np.concatenate([without[:half], with_canary[:half]]))
    trials = [
        _bounds(without[:half], with_canary[:half], candidates, above, delta, confidence)[0] for above in (True, False)
    ]
    above = bool(np.max(trials[0]) >= np.max(trials[1]))
    threshold = candidates[np.argmax(trials[0 if above else 1])]
    bound, true, false = _bounds(without[half:], with_canary[half:], threshold[None], above, delta, confidence)
    return AuditResult(float(bound[0]), float(true[0]), float(false[0]), float(threshold), above)


def _bounds(without, with_canary, thresholds, above: bool, delta: float, confidence: float):
    """(lower bounds of epsilon, true positive rates, false positive rates), each [thresholds]. A score is positive at
    or above the threshold, or, with `above` false, "out" is called positive and the two kinds change places."""
    from scipy import stats  # slow to import, and only audits need it

    def count(scores):
        below = np.searchsorted(np.sort(scores), thresholds, side="left")
        return len(scores) - below if above else below

    inside, outside = (with_canary, without) if above else (without, with_canary)
    true, false = count(inside), count(outside)
    num, error = len(inside), (1 - confidence) / 2  # each rate may err so often
    low = np.where(true == 0, 0.0, stats.beta.ppf(error, np.maximum(true, 1), num - true + 1))
    high = np.where(false == num, 1.0, stats.beta.ppf(1 - error, false + 1, np.maximum(num - false, 1)))
    bound = np.log(np.maximum((low - delta) / high, 1.0))
    return bound, true / num, false / num
