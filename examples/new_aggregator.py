"""An aggregator of one's own: every coordinate's mean of the middle half of the clients, against one that attacks.

python examples/new_aggregator.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fmfl_jax as fl


def middle_half() -> fl.Aggregator:
    """The mean between the quartiles of the present clients, coordinate by coordinate."""

    def aggregate(gathered: fl.GatheredUpdates, state, key):
        present = gathered.weights > 0

        def one(rows):  # [C, ...] -> [...]
            rows = jnp.where(present.reshape(-1, *(1,) * (rows.ndim - 1)), rows, jnp.nan)
            low, high = (jnp.nanquantile(rows, q, axis=0) for q in (0.25, 0.75))
            inside = (rows >= low[None]) & (rows <= high[None])
            count = jnp.sum(inside.astype(jnp.float32), axis=0)
            return jnp.sum(jnp.where(inside, rows, 0.0), axis=0) / jnp.maximum(count, 1.0)

        return jax.tree.map(one, gathered.updates), {"present": jnp.sum(present.astype(jnp.float32))}

    return fl.Aggregator(aggregate=aggregate)


def final_error(aggregator: fl.Aggregator) -> float:
    """How far ten rounds of eight clients, one of which sends ten times its update, end from the honest optimum."""
    optima = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    loss_fn = lambda params, frozen, batch, key: jnp.sum((params["w"] - batch) ** 2)
    algorithm = fl.fed_opt(jax.value_and_grad(loss_fn), optax.sgd(0.1))
    parts = fl.make_round(algorithm, aggregator=aggregator, attack=fl.scaling(-10.0))
    run, state = fl.pmap_round(parts), fl.replicate(parts.init({"w": jnp.zeros(3)}, 0))
    for _ in range(10):
        cohort = fl.Cohort(
            client_ids=np.arange(8, dtype=np.int32),
            weights=np.ones(8, np.float32),
            batches=np.repeat(optima[:, None], 4, axis=1),
            extras={"malicious": np.arange(8) == 0},
        )
        state, _, _ = run(state, (), fl.put_on_devices(cohort))
    return float(np.abs(np.asarray(state.params["w"]) - optima[1:].mean(axis=0)).max())


def main() -> tuple[float, float]:
    plain, robust = final_error(fl.Aggregator()), final_error(middle_half())
    print(f"distance from the honest optimum: mean {plain:.3g}, middle half {robust:.3g}")
    return plain, robust


if __name__ == "__main__":
    main()
