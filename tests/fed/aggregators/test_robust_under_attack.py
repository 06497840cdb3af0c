"""An experiment: the mean of what honest clients hold, estimated by every defence under every attack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.fed import attacks
from fmfl_jax.fed.aggregators import robust
from fmfl_jax.fed.core.reduce import gathered_mean
from fmfl_jax.fed.core.types import Aggregator, GatheredUpdates

NUM_CLIENTS, DIM, TRIALS = 20, 40, 8
ATTACKS = {
    "none": lambda gathered, malicious, key: gathered.updates,
    "sign flip x4": attacks.sign_flip(4.0),
    "scaling x10": attacks.scaling(10.0),
    "ALIE z=1.5": attacks.alie(1.5),
    "inner product 5": attacks.inner_product(5.0),
    "Gaussian 10": attacks.gaussian(10.0),
}
DEFENCES = {
    "mean": Aggregator(),
    "median": robust.median(),
    "trimmed .2": robust.trimmed(0.2),
    "Krum": robust.krum(0.2),
    "multi-Krum": robust.multi_krum(0.2),
    "geometric median": robust.geometric_median(),
    "norm bound 13": robust.norm_bound(13.0),
    "FLTrust": robust.fltrust(),
}


def estimation_errors():
    """{defence: {attack: mean |estimate - truth|}}: each client holds the truth + N(0, 0.5^2), the server is at 0."""
    rng = np.random.default_rng(0)
    truth = np.full(DIM, 2.0, np.float32)
    held = truth + 0.5 * rng.normal(size=(TRIALS, NUM_CLIENTS, DIM)).astype(np.float32)
    server_data = truth + 0.2 * rng.normal(size=(TRIALS, DIM)).astype(np.float32)
    malicious = jnp.asarray(attacks.malicious_clients(NUM_CLIENTS, 0.2, seed=1))
    weights = jnp.ones(NUM_CLIENTS)

    def under(attack, held, server_data, key):
        gathered = GatheredUpdates(
            {"w": -held},
            weights,
            weights,
            {"malicious": malicious},
            {"w": -server_data},
            client_ids=jnp.arange(NUM_CLIENTS),
        )
        return attack(gathered, malicious, key)["w"]

    keys = jax.random.split(jax.random.key(0), TRIALS)
    attacked = jnp.stack(
        [jax.vmap(functools.partial(under, attack))(held, server_data, keys) for attack in ATTACKS.values()]
    )

    def error(defence, updates, server_data):
        updates = {"w": updates}
        if defence.transform_update is not None:
            updates, _ = jax.vmap(lambda m: defence.transform_update(m, ()))(updates)
        gathered = GatheredUpdates(updates, weights, weights, {}, {"w": -server_data})
        update = gathered_mean(gathered) if defence.aggregate is None else defence.aggregate(gathered, (), None)[0]
        return jnp.linalg.norm(-update["w"] - truth)

    table = {}
    for name, defence in DEFENCES.items():
        errors = jax.jit(jax.vmap(jax.vmap(functools.partial(error, defence)), in_axes=(0, None)))(
            attacked, server_data
        )
        table[name] = dict(zip(ATTACKS, np.mean(errors, axis=1).tolist()))
    return table


def test_mean_estimation_under_attack():
    table = estimation_errors()
    mean = table["mean"]
    assert mean["none"] < 1.0
    for name, errors in table.items():
        if name == "mean":
            continue
        for attack in ("sign flip x4", "scaling x10"):
            assert mean[attack] > 2.0 * errors[attack], (name, attack)
        assert errors["none"] < 4.0, name  # one client alone errs by 0.5 sqrt(40) = 3.2
    for name in ("median", "trimmed .2", "multi-Krum", "geometric median"):
        assert table[name]["inner product 5"] < 0.25 * mean["inner product 5"], name
    # Made not to be seen: no defence that looks at the updates alone is better than the plain mean by much.
    assert table["multi-Krum"]["ALIE z=1.5"] > mean["none"]
