"""Times the wireless simulation against a plain NumPy version of the same model, in turn, in one process.

  python -m launch.benchmark_wireless
  python -m launch.benchmark_wireless --users=100000 --rounds=200

Prints one line per measurement: the task, seconds of ours (compiled, best of three) and of NumPy, and the ratio.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from fmfl_jax.wireless import fading, network, presets, simulate, transfer

_USERS = flags.DEFINE_integer(
    "users", 1_000_000, "Users of the one-call round (drop, channel, allocation, round time)."
)
_ROUNDS = flags.DEFINE_integer("rounds", 1000, "Rounds of the time-resolved simulation.")
_CLIENTS = flags.DEFINE_integer("clients", 20, "Clients of the time-resolved simulation.")
_PAYLOAD_BITS = flags.DEFINE_float(
    "payload_bits", 8.0 * 163840, "Uplink bits of a client and round (20-token prompt, 7B)."
)


def _best(function, repeats=3):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return min(times), result


def numpy_round(rng, users, bandwidth_hz, payload_bits, radius_m=500.0):
    """Drop, log-distance loss, C/N0, and the min-max split by bisection with a bisection inside, all vectorized
    NumPy."""
    radius = radius_m * np.sqrt(rng.uniform((10.0 / radius_m) ** 2, 1.0, users).astype(np.float32))
    angle = rng.uniform(0.0, 2.0 * np.pi, users).astype(np.float32)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    distance = np.sqrt(x * x + y * y)
    cn0 = np.float32(10.0) ** ((23.0 - 15.3 - 37.6 * np.log10(distance) + 174.0) / 10.0).astype(np.float32)

    def bandwidth(duration):
        level = np.log(cn0 * duration / (payload_bits * np.log(2.0)))
        u = level + np.log1p(level)
        for _ in range(4):
            u = u - (np.log(np.expm1(u) / u) - level) / (1.0 + 1.0 / np.expm1(u) - 1.0 / u)
        return payload_bits * np.log(2.0) / (duration * u)

    share = bandwidth_hz / users
    low = payload_bits * np.log(2.0) / cn0.min() * (1 + 1e-6)
    high = np.max(payload_bits / (share * np.log1p(cn0 / share) / np.log(2.0)))
    for _ in range(25):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if bandwidth(middle).sum() > bandwidth_hz else (low, middle)
    return high


def numpy_transfers(rng, rounds, clients, payload_bits, snr, bandwidth_hz, slot_s, rho):
    """Shannon slots over AR(1) Rayleigh fading, all rounds and clients side by side, one slot at a time."""
    shape = (rounds, clients)
    h = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) * np.sqrt(0.5)
    left, slots = np.full(shape, payload_bits), np.zeros(shape)
    while np.any(left > 0.0):
        w = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) * np.sqrt(0.5)
        h = rho * h + np.sqrt(1.0 - rho * rho) * w
        slots += left > 0.0
        left -= slot_s * bandwidth_hz * np.log2(1.0 + snr * np.abs(h) ** 2)
    return slots * slot_s


def _report(task, ours_s, theirs_s, checks):
    print(f"{task}: ours {ours_s:.3f} s, NumPy {theirs_s:.3f} s, {theirs_s / ours_s:.1f}x; {checks}", flush=True)


def _one_call(users):
    bits = 1e3

    def play(config, key):
        state = network.init_network(config, key)
        zeros = jnp.zeros((users,))
        return simulate.simulate_round(config, state, key, jnp.full((users,), bits), 1e3, zeros, zeros)[1]

    config = presets.facts_20(num_clients=users, max_uplink_s=1e6)
    ours = jax.jit(functools.partial(play, config))
    jax.block_until_ready(ours(jax.random.key(0)))
    ours_s, outcome = _best(lambda: ours(jax.random.key(1)))
    theirs_s, expected = _best(lambda: numpy_round(np.random.default_rng(1), users, 20e6, bits), repeats=1)
    upload_s = float(outcome.latency_s - outcome.downlink_s[0])
    _report(
        f"one round of {users} users, one cell", ours_s, theirs_s, f"round {upload_s:.4g} s against {expected:.4g} s"
    )
    cells = presets.umi_20(num_clients=users, num_cells=users // 20, transfer_mode="static", rate_model="shannon")
    full = jax.jit(functools.partial(play, cells))
    jax.block_until_ready(full(jax.random.key(0)))
    full_s, outcome = _best(lambda: full(jax.random.key(1)))
    analysis = full.lower(jax.random.key(1)).compile().memory_analysis()
    assert analysis is not None  # XLA has one on CPUs and GPUs
    memory = analysis.temp_size_in_bytes
    print(
        f"the same users in {users // 20} UMi cells (LOS and shadowing fields, mobility): {full_s:.3f} s, "
        f"{memory / users:.0f} bytes of temporaries a user, {int(outcome.delivered.sum())} delivered",
        flush=True,
    )


def _time_resolved(rounds, clients, payload_bits):
    shape = (clients,)
    for rate, harq in (("shannon", "type1"), ("mcs", "type1"), ("mcs", "chase")):
        model = transfer.SlotModel(1e-3, 9.7, rate, 0.0, harq, 4, 1000.0)
        send = jax.jit(
            jax.vmap(
                lambda key, model=model: transfer.slotted_transfer(
                    key,
                    jnp.full(shape, payload_bits),
                    jnp.full(shape, 1e6),
                    jnp.full(shape, 1e7),
                    jnp.zeros(shape),
                    jnp.full(shape, 600.0),
                    model,
                )
            )
        )
        keys = jax.random.split(jax.random.key(0), rounds)
        jax.block_until_ready(send(keys))
        ours_s, sent = _best(lambda send=send, keys=keys: send(keys))
        task = (
            f"{rounds} rounds x {clients} clients, {rate} {harq}, mean {float(jnp.mean(sent.time_s)):.3f} s on the air"
        )
        if rate == "shannon":
            rho = float(fading.time_correlation(9.7, 1e-3))
            theirs_s, expected = _best(
                lambda rho=rho: numpy_transfers(
                    np.random.default_rng(0), rounds, clients, payload_bits, 10.0, 1e6, 1e-3, rho
                ),
                repeats=1,
            )
            _report(task, ours_s, theirs_s, f"NumPy's mean {expected.mean():.3f} s")
        else:
            print(f"{task}: ours {ours_s:.3f} s", flush=True)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    if _USERS.value < 20 or _USERS.value % 20:
        raise app.UsageError(f"--users must be a positive multiple of 20, got {_USERS.value}")
    print(f"{jax.devices()[0].platform}, {jax.device_count()} device(s)", flush=True)
    _one_call(_USERS.value)
    _time_resolved(_ROUNDS.value, _CLIENTS.value, _PAYLOAD_BITS.value)


if __name__ == "__main__":
    app.run(main)
