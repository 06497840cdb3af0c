"""FedAvg (McMahan et al., AISTATS 2017), FedOpt (Reddi et al., ICLR 2021) and FedProx (Li et al., MLSys 2020).

    delta = sum_c n_c (w - w_c) / sum_c n_c;   w <- server_optimizer(w, delta)

The weighted mean of the clients' deltas is the server optimizer's gradient. SGD with learning rate 1 is FedAvg; SGD
with momentum is FedAvgM; optax.adam, yogi and adagrad are FedOpt with optax's bias correction and starting values,
which are not those of Reddi et al., Algorithm 2.
"""

from typing import Callable

import jax
import jax.numpy as jnp
import optax

from fmfl_jax.fed.aggregate import weighted_mean_over_clients
from fmfl_jax.fed.algorithm import Cohort, FederatedAlgorithm, ServerState
from fmfl_jax.fed.client import local_update
from fmfl_jax.fed.optimize import optimizer_step
from fmfl_jax.fed.uplink import Uplink, keep_lost


def fed_opt(loss_fn: Callable, client_optimizer: optax.GradientTransformation,
            server_optimizer: optax.GradientTransformation | None = None, *, proximal: float = 0.0,
            clients_per_pass: int | None = None, uplink: Uplink | None = None) -> FederatedAlgorithm:
    """The algorithm as init and round.

    loss_fn(params, frozen, batch, key) -> scalar mean loss of one local step's batch.
    server_optimizer: default optax.sgd(1.0), which is FedAvg. proximal: FedProx's mu, 0 for none.
    clients_per_pass: how many clients of a device train side by side; None is all.
    uplink: what the deltas pass on their way (fed/uplink.py); None sends them as they are. Its state (error feedback)
      is the client's: a client that was not heard puts the lost message back, one that is not finite keeps its state.
    """
    server_optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer

    def init(params, seed: int) -> ServerState:
        return ServerState(params, server_optimizer.init(params), jnp.zeros((), jnp.int32), jnp.uint32(seed))

    def round(state: ServerState, frozen, cohort: Cohort):
        round_key = jax.random.fold_in(jax.random.key(state.seed), state.round)

        def client(own: Cohort):
            key = jax.random.fold_in(round_key, own.client_ids)
            update = local_update(loss_fn, client_optimizer, state.params, frozen, own.batches, key, proximal=proximal)
            if uplink is None:
                return update.delta, {"loss": update.loss}, ()
            return _send(uplink, update, own, key)

        mean = weighted_mean_over_clients(client, cohort, clients_per_pass=clients_per_pass)
        stepped = optimizer_step(server_optimizer, mean.values, state.opt_state, state.params)
        heard = mean.weight > 0  # a round that nobody survives leaves the server as it was
        params, opt_state = jax.tree.map(lambda new, old: jnp.where(heard, new, old), stepped,
                                         (state.params, state.opt_state))
        metrics = mean.scalars | {"delta_norm": optax.tree.norm(mean.values), "examples": mean.normalizer,
                                  "dropped_clients": mean.dropped}
        state = ServerState(params, opt_state, state.round + 1, state.seed)
        return (state, metrics) if uplink is None else (state, metrics, mean.kept)

    return FederatedAlgorithm(init, round, None if uplink is None else uplink.init)


def _send(uplink: Uplink, update, own: Cohort, key):
    """One client's message: (decoded delta, scalars, its uplink state after it learnt whether it was heard)."""
    # The local steps fold in 0, 1, ...: this number is none of theirs.
    decoded, sent, bits = uplink.apply(update.delta, own.client_states, jax.random.fold_in(key, 2**31 - 1))
    after = keep_lost(sent, decoded, own.weights > 0)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((update.delta, after))]))
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, own.client_states)
    return decoded, {"loss": update.loss, "payload_bits": bits, "entropy_bits": sent.entropy_bits}, kept
