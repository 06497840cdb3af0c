"""The private and secure parts of a federation: noise calibrated to a target, what was spent, the fixed point of secure
aggregation and the real protocol beside the device's sum."""

import functools
import sys
from collections.abc import Callable

import jax
import numpy as np
from tqdm import tqdm

from fmfl_jax.experiment.federation_config import FederationConfig
from fmfl_jax.experiment.rounds import RoundsConfig
from fmfl_jax.fed.privacy.accounting import SampledGaussian, calibrate_noise, example_level_spent, privacy_spent
from fmfl_jax.fed.secure.aggregator import run_on_host
from fmfl_jax.fed.secure.fixed_point import FixedPoint
from fmfl_jax.fed.sharding import padded_cohort_size


def noise_multiplier(fed: FederationConfig, rounds: RoundsConfig, sizes: np.ndarray) -> float | None:
    """The configured one, or what reaches the target epsilon after all rounds; None without differential privacy."""
    if fed.dp is None or fed.dp.noise_multiplier is not None:
        return None if fed.dp is None else fed.dp.noise_multiplier
    if "dp" in fed.privacy:
        rate, steps = rounds.cohort_size / len(sizes), rounds.num_rounds
    else:  # the client with the least data pays most, and may take part in every round
        rate, steps = min(1.0, rounds.batch_size / sizes.min()), rounds.num_rounds * rounds.local_steps
    return calibrate_noise(
        fed.dp.target_epsilon,
        sampling_rate=float(rate),
        steps=steps,
        delta=fed.dp.delta,
        progress=functools.partial(tqdm.write, file=sys.stderr),
    )


def spent_on(fed: FederationConfig, rounds: RoundsConfig, sizes: np.ndarray, noise: float | None) -> Callable | None:
    """spent(cohorts so far) -> {"epsilon", "epsilon_rdp", "delta"}; None where there is no noise, which no epsilon
    bounds."""
    if not noise:
        return None

    def spent(cohorts: list) -> dict:
        if "dp" in fed.privacy:
            release = SampledGaussian(rounds.cohort_size / len(sizes), noise)
            cost = privacy_spent([(release, len(cohorts))], fed.dp.delta)
        else:
            turns = np.bincount(
                np.concatenate([np.zeros(0, np.int64), *cohorts]).astype(np.int64), minlength=len(sizes)
            )
            cost = example_level_spent(
                sizes,
                rounds.local_steps * turns,
                batch_size=rounds.batch_size,
                noise_multiplier=noise,
                delta=fed.dp.delta,
            )
        return {"epsilon": cost.epsilon_pld, "epsilon_rdp": cost.epsilon_rdp, "delta": cost.delta}

    return spent


def make_codec(fed: FederationConfig, rounds: RoundsConfig, num_clients: int) -> FixedPoint:
    """Fixed point for as many clients as a cohort can have, padding included."""
    most = num_clients if fed.selection == "poisson" else rounds.cohort_size
    most = padded_cohort_size(most, num_devices=jax.device_count(), clients_per_pass=rounds.clients_per_pass)
    bits = min(fed.secure_bits, 32 - (most - 1).bit_length())
    return FixedPoint(clip=fed.secure_clip, bits=bits, max_clients=most, stochastic=bits < 16)


def quorum(cohort_size: int) -> int:
    """How many clients of a cohort secure aggregation needs: more than two thirds, and never a single one."""
    return max(2, 2 * cohort_size // 3 + 1)


def protocol(codec: FixedPoint) -> Callable:
    """on_exports: the round's integers go through the real protocol, whose sum must be the device's bit for bit."""

    def run(exports, turn, r) -> dict:
        del r
        if not np.any(turn.heard):
            return {}
        result = run_on_host(exports, turn.client_ids, codec, threshold=quorum(len(turn.client_ids)))
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
