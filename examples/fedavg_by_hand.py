"""FedAvg in a loop of one's own: the client half and the server half of an algorithm, called as plain functions.

python examples/fedavg_by_hand.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fmfl_jax as fl

NUM_CLIENTS, STEPS = 5, 4
rng = np.random.default_rng(0)
optima = rng.normal(size=(NUM_CLIENTS, 3)).astype(np.float32)  # client c minimizes |w - optima[c]|^2
weights = rng.integers(1, 10, NUM_CLIENTS).astype(np.float32)  # numbers of examples


def loss_fn(params, frozen, batch, key):
    return jnp.sum((params["w"] - batch) ** 2)


def main() -> float:
    algorithm = fl.fed_opt(jax.value_and_grad(loss_fn), optax.sgd(0.1))
    state = algorithm.init({"w": jnp.zeros(3)}, 0)
    run_client = jax.jit(lambda context, batches: fl.run_client(algorithm.client, context, batches))
    for r in range(30):
        message, key = algorithm.broadcast(state), jax.random.fold_in(jax.random.key(0), r)
        total = jax.tree.map(jnp.zeros_like, message)
        for c in range(NUM_CLIENTS):
            client_key = jax.random.fold_in(key, c)
            context = fl.ClientContext(message, (), (), jnp.int32(c), jnp.float32(weights[c]), None, client_key)
            result = run_client(context, np.repeat(optima[c][None], STEPS, axis=0))
            total = jax.tree.map(lambda t, u: t + result.weight * u, total, result.update)
        mean = jax.tree.map(lambda t: t / weights.sum(), total)
        state = algorithm.server(state, fl.Aggregate(mean, {}, jnp.float32(1), jnp.float32(1)))
    error = float(jnp.abs(state.params["w"] - weights @ optima / weights.sum()).max())
    print(f"after 30 rounds the model is {error:.1e} from the clients' weighted optimum")
    return error


if __name__ == "__main__":
    main()
