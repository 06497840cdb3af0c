"""What a membership attack learns of one client of DP-FedAvg, against the epsilon that the accountant allows.

  python -m launch.privacy_audit --dp_noise=2 --num_clients=20 --cohort_size=20 --num_rounds=4 --dp_delta=1e-3

A canary client with a huge update takes part in half of many short runs of the real round; how well the released
updates tell them apart gives a lower bound on epsilon. A lower bound above the accountant's epsilon proves a defect
(exit status 1); one below it proves nothing. --claimed_noise tells the accountant another noise than the one that is
added: the way to see the audit find something.
"""

import math
import sys

import jax
import numpy as np
from absl import flags

from fmfl_jax.fed.aggregators.dp_fedavg import AdaptiveClipping, dp_fedavg
from fmfl_jax.fed.privacy.accounting import SampledGaussian, calibrate_noise, privacy_spent
from fmfl_jax.fed.privacy.audit import canary_scores, epsilon_lower_bound
from launch import app
from launch.device_memory import require_memory

_NOISE = flags.DEFINE_float("dp_noise", None, "Noise multiplier that is added.")
_EPSILON = flags.DEFINE_float("dp_epsilon", None, "Instead of --dp_noise: the noise that costs this epsilon.")
_CLAIMED = flags.DEFINE_float("claimed_noise", None, "Noise multiplier for the accountant; default: what is added.")
_DELTA = flags.DEFINE_float("dp_delta", 1e-3, "Delta of the guarantee.")
_CLIP = flags.DEFINE_float("dp_clip", 1.0, "L2 norm of an update.")
_QUANTILE = flags.DEFINE_float("dp_quantile", None, "The clip follows this quantile of the clients' norms.")
_CAP = flags.DEFINE_float("dp_cap", None, "A client of n examples weighs min(n, cap) / cap; default: all weigh 1.")
_NUM_CLIENTS = flags.DEFINE_integer("num_clients", 20, "Clients beside the canary.", lower_bound=1)
_COHORT = flags.DEFINE_integer(
    "cohort_size", None, "Expected clients of a round, drawn one by one; default: all.", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer("num_rounds", 4, "Rounds of a run.", lower_bound=1)
_RUNS = flags.DEFINE_integer("num_runs", 4000, "Runs with the canary, and as many without it.", lower_bound=2)
_CONFIDENCE = flags.DEFINE_float("confidence", 0.95, "Of the lower bound.")
_SEED = flags.DEFINE_integer("seed", 0, "Determines everything random.", lower_bound=0)

_NUM_VALUES = 8  # of the vector that is trained beside a scalar
_ATTACKS = {"on a vector and a scalar": 0.5, "on the scalar alone": 1.0}


def main():
    cohort = _NUM_CLIENTS.value if _COHORT.value is None else _COHORT.value
    _check_flags(cohort)
    rate, rounds = cohort / _NUM_CLIENTS.value, _ROUNDS.value
    noise = _NOISE.value
    if noise is None:
        assert _EPSILON.value is not None  # _check_flags asks for one of the two
        noise = calibrate_noise(_EPSILON.value, sampling_rate=rate, steps=rounds, delta=_DELTA.value, progress=app.say)
    claimed = noise if _CLAIMED.value is None else _CLAIMED.value
    cost = privacy_spent([(SampledGaussian(rate, claimed), rounds)], _DELTA.value)
    app.say(
        f"accountant: epsilon {cost.epsilon_pld:.4g} (PLD; RDP {cost.epsilon_rdp:.4g}) at delta {_DELTA.value:g}: "
        f"noise {claimed:.4g}, rate {rate:.4g}, {rounds} rounds; noise that is added: {noise:.4g}"
    )
    confidence = 1 - (1 - _CONFIDENCE.value) / len(_ATTACKS)  # of each, so that all hold together
    bound = lambda *scores: epsilon_lower_bound(*scores, delta=_DELTA.value, confidence=confidence)
    most = bound(np.zeros(_RUNS.value), np.ones(_RUNS.value)).epsilon
    if most <= cost.epsilon_pld:
        app.say(f"{_RUNS.value} runs can show an epsilon of {most:.4g} at most: too few to find a defect (--num_runs)")
    found = 0.0
    for name, share in _ATTACKS.items():
        result = bound(*_scores(noise, cohort, rate, share))
        found = max(found, result.epsilon)
        app.say(
            f"attack {name}: epsilon at least {result.epsilon:.4g} (true positives {result.true_positives:.3f}, "
            f"false {result.false_positives:.3f})"
        )
    app.say(
        f"audit: epsilon is at least {found:.4g}, with confidence {_CONFIDENCE.value:g}; "
        f"{_RUNS.value} runs with and without the canary can show {most:.4g} at most"
    )
    if found > cost.epsilon_pld:
        app.say("a defect: the attack learns more than the accountant allows")
        sys.exit(1)
    app.say("no defect found, which proves nothing: the attack may be weak")


def _scores(noise: float, cohort: int, rate: float, scalar_share: float):
    aggregator = dp_fedavg(
        clip_norm=_CLIP.value,
        noise_multiplier=noise,
        expected_cohort=float(cohort),
        weighting="uniform" if _CAP.value is None else "capped",
        cap=_CAP.value,
        adaptive=None if _QUANTILE.value is None else AdaptiveClipping(quantile=_QUANTILE.value),
    )
    return canary_scores(
        aggregator,
        num_runs=_RUNS.value,
        num_clients=_NUM_CLIENTS.value,
        sampling_rate=rate,
        rounds=_ROUNDS.value,
        num_values=_NUM_VALUES,
        scalar_share=scalar_share,
        seed=_SEED.value,
    )


def _check_flags(cohort: int):
    if (_NOISE.value is None) == (_EPSILON.value is None):
        raise ValueError("expected one of --dp_noise and --dp_epsilon")
    for flag, low, high, what in (
        (_NOISE, 0, math.inf, "at least 0"),
        (_CLAIMED, 0, math.inf, "at least 0"),
        (_EPSILON, 1e-6, math.inf, "at least 1e-6"),
        (_DELTA, 1e-300, 1, "above 0 and below 1"),
        (_CLIP, 1e-30, 1e30, "a positive number"),
        (_QUANTILE, 0, 1, "at least 0 and below 1"),
        (_CAP, 1e-30, 1e30, "a positive number"),
        (_CONFIDENCE, 0.5, 1, "at least 0.5 and below 1"),
    ):
        if flag.value is not None and not low <= flag.value < high:  # also for nan
            raise ValueError(f"--{flag.name} is {flag.value}: expected {what}")
    if cohort > _NUM_CLIENTS.value:
        raise ValueError(f"--cohort_size is {cohort}, but --num_clients is {_NUM_CLIENTS.value}")
    clients = _NUM_CLIENTS.value + 1
    needed = 2 * _RUNS.value * clients * (16 * (_NUM_VALUES + 1) + 9 * _ROUNDS.value)  # updates; who took part
    require_memory(jax.devices()[0], needed, f"--num_runs={_RUNS.value} with --num_clients={_NUM_CLIENTS.value}")


if __name__ == "__main__":
    app.run(main)
