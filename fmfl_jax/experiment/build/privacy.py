"""The private and secure parts of a federation: noise calibrated to a target, what was spent, the fixed point of secure
aggregation and the real protocol beside the device's sum."""

import functools
import sys

import jax
import numpy as np

from fmfl_jax.experiment.config.federation import FederationConfig
from fmfl_jax.experiment.config.rounds import RoundsConfig
from fmfl_jax.experiment.loop.participation import Record
from fmfl_jax.experiment.loop.rounds import Callback, RoundView
from fmfl_jax.experiment.methods.selections import Poisson
from fmfl_jax.fed.aggregators.secure import run_on_host
from fmfl_jax.fed.core.cohort import padded_size
from fmfl_jax.fed.privacy.accounting import SampledGaussian, calibrate_noise, example_level_spent, privacy_spent
from fmfl_jax.fed.secure.fixed_point import FixedPoint


def noise_multiplier(fed: FederationConfig, rounds: RoundsConfig, sizes: np.ndarray) -> float | None:
    """The configured one, or what reaches the target epsilon after all rounds; None without differential privacy."""
    if fed.dp is None:
        return None
    if fed.dp.target_epsilon is None:  # then it has a noise multiplier
        return fed.dp.noise_multiplier
    if "dp" in fed.privacy:
        rate, steps = rounds.cohort_size / len(sizes), rounds.num_rounds
    else:  # the client with the least data pays most, and may take part in every round
        rate, steps = min(1.0, rounds.batch_size / sizes.min()), rounds.num_rounds * rounds.local_steps
    return calibrate_noise(
        fed.dp.target_epsilon,
        sampling_rate=float(rate),
        steps=steps,
        delta=fed.dp.delta,
        progress=functools.partial(print, file=sys.stderr, flush=True),
    )


def accounting(
    fed: FederationConfig, rounds: RoundsConfig, sizes: np.ndarray, noise: float | None
) -> tuple[Callback, ...]:
    """The callback that gives {"epsilon", "epsilon_rdp", "delta"} spent so far; none where there is no noise, which no
    epsilon bounds."""
    if not noise or fed.dp is None:
        return ()
    delta = fed.dp.delta

    def spent(view: RoundView) -> Record:
        cohorts = [record["clients"] for record in view.history[1:]]
        if "dp" in fed.privacy:
            release = SampledGaussian(rounds.cohort_size / len(sizes), noise)
            cost = privacy_spent([(release, len(cohorts))], delta)
        else:
            drawn = np.concatenate([np.zeros(0, np.int64), *cohorts]).astype(np.int64)
            cost = example_level_spent(
                sizes,
                rounds.local_steps * np.bincount(drawn, minlength=len(sizes)),
                batch_size=rounds.batch_size,
                noise_multiplier=noise,
                delta=delta,
            )
        return {"epsilon": cost.epsilon_pld, "epsilon_rdp": cost.epsilon_rdp, "delta": cost.delta}

    return (spent,)


def make_codec(fed: FederationConfig, rounds: RoundsConfig, num_clients: int) -> FixedPoint:
    """Fixed point for as many clients as a cohort can have, padding included."""
    most = num_clients if isinstance(fed.selection, Poisson) else rounds.cohort_size
    most = padded_size(most, num_devices=jax.device_count(), clients_per_pass=rounds.clients_per_pass)
    bits = min(fed.secure_bits, 32 - (most - 1).bit_length())
    return FixedPoint(clip=fed.secure_clip, bits=bits, max_clients=most, stochastic=bits < 16)


def quorum(cohort_size: int) -> int:
    """How many clients of a cohort secure aggregation needs: more than two thirds, and never a single one."""
    return max(2, 2 * cohort_size // 3 + 1)


def secure_protocol(codec: FixedPoint) -> Callback:
    """After each round its integers go through the real protocol, whose sum must be the device's bit for bit."""

    def run(view: RoundView) -> Record:
        participation = view.participation
        assert participation is not None  # it is called after rounds
        if not np.any(participation.delivered):
            return {}
        threshold = quorum(len(participation.client_ids))
        result = run_on_host(view.exports, participation.client_ids, codec, threshold=threshold)
        up, down = (
            sum(sum(phase.values()) for phase in sent.values()) for sent in (result.bytes_up, result.bytes_down)
        )
        return {
            "secure_protocol_s": result.seconds,
            "secure_bytes_up": up,
            "secure_bytes_down": down,
            "secure_survivors": len(result.survivors),
        }

    return run
