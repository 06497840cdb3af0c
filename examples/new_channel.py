"""A channel of one's own: an upload whose link drops to a tenth of its rate while a vehicle is in a tunnel.

  python examples/new_channel.py

A channel is a pure function of arrays that says whose update is delivered; the round needs nothing else of it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fmfl_jax as fl


def tunnel_upload(key, payload_bits, rate_bps, deadline_s, *, tunnel_share=0.4):
    """(latency_s [C], delivered bool [C]). payload_bits: scalar. rate_bps: [C], outside of the tunnel. tunnel_share: of
    the uploads that fall into it."""
    inside = jax.random.uniform(key, rate_bps.shape) < tunnel_share
    latency_s = payload_bits / jnp.where(inside, 0.1 * rate_bps, rate_bps)
    return latency_s, latency_s <= deadline_s


def main() -> dict[float, float]:
    optima = np.random.default_rng(0).normal(size=(10, 200)).astype(np.float32)
    loss_fn = lambda params, frozen, batch, key: jnp.mean((params["w"] - batch) ** 2)
    parts = fl.make_round(fl.fed_opt(jax.value_and_grad(loss_fn), optax.sgd(10.0)))
    run, payload_bits = fl.pmap_round(parts), float(fl.tree_bits({"w": jnp.zeros(200)}))
    rate_bps = jnp.linspace(2e4, 2e5, 10)
    reached = {}
    for deadline_s in (0.05, 0.5, 5.0):
        state, seconds, count = fl.replicate(parts.init({"w": jnp.zeros(200)}, 0)), 0.0, 0
        for r in range(15):
            key = jax.random.fold_in(jax.random.key(1), r)
            latency_s, delivered = jax.device_get(tunnel_upload(key, payload_bits, rate_bps, deadline_s))
            seconds += float(min(latency_s.max(), deadline_s))
            count += int(delivered.sum())
            weights, batches = np.ones(10, np.float32), np.repeat(optima[:, None], 2, axis=1)
            cohort = fl.Cohort(np.arange(10, dtype=np.int32), weights, batches, delivered=delivered)
            state, _, _ = run(state, (), fl.put_on_devices(cohort))
        error = float(np.linalg.norm(np.asarray(state.params["w"]) - optima.mean(axis=0)))
        print(f"deadline {deadline_s:4} s: {count / 150:.0%} delivered, {seconds:5.1f} s, {error:.2f} from the optimum")
        reached[deadline_s] = error
    return reached


if __name__ == "__main__":
    main()
