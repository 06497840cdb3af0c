"""How good the clients' personal models are on their held-out text: the mean, the worst decile, the inequality.

Fairness as in Ditto (Li et al., ICML 2021): the spread of the clients' losses. The clients pass in groups, their states
come from the store, the base is shared.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax import streams
from fmfl_jax.experiment.build.language_model import ClientData
from fmfl_jax.experiment.loop.participation import Record
from fmfl_jax.experiment.loop.rounds import Callback, RoundView
from fmfl_jax.fed.core.types import FederatedAlgorithm
from fmfl_jax.models.llama import Merge
from fmfl_jax.models.loss import token_nll
from fmfl_jax.parallel import local_copy


def hold_out(data: ClientData, share: float, *, most: int, seed: int) -> tuple[ClientData, ClientData]:
    """(training data, held-out data): of every client a share of its windows, at least 1 and at most `most`, at random.

    Raises ValueError where a client has a single window: it cannot train and be evaluated.
    """
    train, held = [], []
    for client, indices in enumerate(data.client_indices):
        if len(indices) < 2:
            raise ValueError(
                f"client {client} has a single window: a personal model needs one to train on and one held out"
            )
        count = min(most, max(1, round(share * len(indices))), len(indices) - 1)
        order = streams.host_rng(streams.HOLD_OUT, seed, client).permutation(indices)
        held.append(np.sort(order[:count]))
        train.append(np.sort(order[count:]))
    return ClientData(data.windows, train), ClientData(data.windows, held)


def make_client_evaluator(merge: Merge, algorithm: FederatedAlgorithm, held: ClientData, *, group: int = 8) -> Callback:
    """The callback that evaluates each client's personal model, and the shared one, on the client's held-out windows:
    "client_ppl_mean", "client_shared_ppl_mean" and so on. merge(params, frozen) -> the model of what the algorithm's
    `shared` or `personal` gives."""
    if (personal := algorithm.personal) is None:
        raise ValueError("this algorithm's clients have no personal models")
    num_clients, most = len(held.client_indices), max(map(len, held.client_indices))
    windows = np.zeros((num_clients, most, held.windows.shape[1]), np.int32)
    mask = np.zeros((num_clients, most), np.float32)
    for client, indices in enumerate(held.client_indices):
        windows[client, : len(indices)], mask[client, : len(indices)] = held.windows[indices], 1

    @jax.jit
    def nats_of(params, frozen, states, windows, mask):
        def one(state, windows, mask):
            nll = jnp.stack(
                [
                    token_nll(merge(tuned, frozen), windows)  # [2, E, T]
                    for tuned in (personal(params, state.algorithm), algorithm.shared(params))
                ]
            )
            return jnp.sum(mask[None, :, None] * nll, axis=(1, 2)) / (jnp.sum(mask) * nll.shape[2])

        return jax.vmap(one)(states, windows, mask)  # [group, 2]

    def evaluate(view: RoundView) -> Record:
        params, frozen, nats = local_copy(view.state.params), local_copy(view.frozen), []
        for start in range(0, num_clients, group):
            ids = np.minimum(np.arange(start, start + group), num_clients - 1)  # always the same shape
            both = nats_of(params, frozen, view.client_states(ids), windows[ids], mask[ids])
            nats.append(np.asarray(both)[: num_clients - start])
        of_personal, of_shared = np.concatenate(nats).T
        return summary(of_personal) | {"client_shared_ppl_mean": summary(of_shared)["client_ppl_mean"]}

    return evaluate


def summary(nats: np.ndarray) -> dict:
    """Over the clients' nats per token [C]: the mean perplexity, the mean of the worst tenth, and the standard
    deviation of the nats, which is what fairness asks to be small."""
    ppl = np.exp(np.minimum(nats.astype(np.float64), 700))
    worst = np.sort(ppl)[-max(1, round(len(ppl) / 10)) :]
    return {
        "client_ppl_mean": float(ppl.mean()),
        "client_ppl_worst_decile": float(worst.mean()),
        "client_nats_std": float(nats.std()),
    }
