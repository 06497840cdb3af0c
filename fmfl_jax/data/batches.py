"""From documents to token windows, and from windows to the batches of a federated round.

Everything is a pure function of its arguments: a round's batches and cohort follow from (seed, round) alone, so a
resumed run needs no saved data position.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fmfl_jax import streams
from fmfl_jax.data.corpora import num_bytes
from fmfl_jax.data.tokenizers import Tokenizer


class TokenWindows(NamedTuple):
    """windows: int32 [W, T + 1]. document_id: int32 [W], place in the list of documents."""

    windows: np.ndarray
    document_id: np.ndarray


class EvaluationWindows(NamedTuple):
    """Windows in which every token of a text is predicted exactly once.

    windows: int32 [W, T + 1], the last one filled up with zeros.
    mask: bool [W, T]; mask[w, t] says that windows[w, t + 1], predicted from windows[w, : t + 1], counts.
    num_bytes: UTF-8 bytes of the text. Bits per byte = (sum of the masked losses in nats) / ln 2 / num_bytes.
    """

    windows: np.ndarray
    mask: np.ndarray
    num_bytes: int


class ClientBatches(NamedTuple):
    """tokens: int32 [C, S, B, T + 1] for S local steps of B windows. num_examples: int32 [C], windows held."""

    tokens: np.ndarray
    num_examples: np.ndarray


class PoissonBatches(NamedTuple):
    """tokens: int32 [C, S, B, T + 1], zeros in rows that were not drawn. mask: bool [C, S, B], rows that were, the
    first ones of a batch. num_examples: int32 [C], windows held."""

    tokens: np.ndarray
    mask: np.ndarray
    num_examples: np.ndarray


def token_windows(
    tokenizer: Tokenizer, documents: list[str], seq_len: int, *, add_bos: bool, add_eos: bool
) -> TokenWindows:
    """Training windows of seq_len + 1 tokens at a stride of seq_len: each token is predicted at most once.

    The documents are joined, each opened by bos and closed by eos where asked for and the tokenizer has them. What is
    left after the last whole window is dropped. A window that holds several documents belongs to the one of its middle
    token, which is the one with more than half of the window if there is one.

    Raises ValueError where the text does not fill one window.
    """
    tokens, document, _ = _join(tokenizer, documents, seq_len, add_bos, add_eos)
    num_windows = (len(tokens) - 1) // seq_len
    if num_windows < 1:
        raise ValueError(f"the text has {len(tokens)} tokens: expected at least seq_len + 1 = {seq_len + 1}")
    starts = seq_len * np.arange(num_windows)
    return TokenWindows(tokens[starts[:, None] + np.arange(seq_len + 1)], document[starts + seq_len // 2])


def evaluation_windows(
    tokenizer: Tokenizer, documents: list[str], seq_len: int, *, add_bos: bool, add_eos: bool
) -> EvaluationWindows:
    """Windows as in `token_windows`, with nothing dropped: the last one is filled up and masked.

    Counted is every token but the bos tokens, which are given and not predicted. (With no bos the first token of all
    follows nothing and is not counted; its bytes are, which matters to no text of any length.)
    """
    tokens, _, is_bos = _join(tokenizer, documents, seq_len, add_bos, add_eos)
    num_predicted = len(tokens) - 1
    if num_predicted < 1:
        raise ValueError(f"the text has {len(tokens)} tokens: expected at least 2")
    num_windows = -(-num_predicted // seq_len)
    padding = num_windows * seq_len - num_predicted
    padded = np.pad(tokens, (0, padding))
    starts = seq_len * np.arange(num_windows)
    mask = np.pad(~is_bos[1:], (0, padding)).reshape(num_windows, seq_len)  # [W, T]
    windows = padded[starts[:, None] + np.arange(seq_len + 1)]
    return EvaluationWindows(windows, mask, sum(num_bytes(document) for document in documents))


def client_batches(
    windows: np.ndarray,
    client_indices: list[np.ndarray],
    *,
    client_ids: np.ndarray | None = None,
    round: int,  # The project's name for it; the builtin is not used here.
    local_steps: int,
    batch_size: int,
    seed: int,
) -> ClientBatches:
    """The batches of one round, in the order of client_ids.

    A client walks through its own windows epoch by epoch, each epoch in a new order, and goes on where its last round
    would have ended: round r takes positions r * local_steps * batch_size onwards. A client's batches depend on its
    number, the seed and the round only, whoever else is in the cohort.

    Args:
      windows: int32 [W, T + 1].
      client_indices: the partition, window numbers per client, for all clients.
      client_ids: int [C], the clients of this round by their place in client_indices; None for all of them.
    """
    client_ids = np.arange(len(client_indices)) if client_ids is None else np.asarray(client_ids)
    count = local_steps * batch_size
    chosen = np.empty((len(client_ids), count), np.int64)
    for row, client in enumerate(client_ids.tolist()):
        chosen[row] = _walk(_held(client_indices, client), round * count, count, seed, client)
    tokens = windows[chosen].reshape(len(client_ids), local_steps, batch_size, windows.shape[1])  # [C, S, B, T + 1]
    num_examples = np.asarray([len(client_indices[client]) for client in client_ids.tolist()], np.int32)
    return ClientBatches(tokens, num_examples)


def poisson_client_batches(
    windows: np.ndarray,
    client_indices: list[np.ndarray],
    *,
    client_ids: np.ndarray | None = None,
    round: int,
    local_steps: int,
    batch_size: int,
    capacity: int,
    seed: int,
) -> PoissonBatches:
    """The batches of one round for example-level privacy, in the order of client_ids: each window of a client joins
    each step with probability q = min(1, batch_size / windows held), independently of the others.

    The sampling that the accounting of DP-SGD assumes; a walk through the windows as in `client_batches` is not. A
    batch may be empty. A client's batches depend on its number, the seed and the round only.

    capacity: rows of a batch, see `poisson_capacity`. Raises ValueError when more are drawn: cutting them off would be
      another mechanism than the one accounted for, and another seed would condition the draw (by the chance of the
      overflow, which is what delta would have to grow by).
    """
    client_ids = np.arange(len(client_indices)) if client_ids is None else np.asarray(client_ids)
    if batch_size < 1 or capacity < 1:
        raise ValueError(f"batch_size is {batch_size} and capacity {capacity}: expected at least 1")
    shape = (len(client_ids), local_steps, capacity)
    tokens, mask = np.zeros((*shape, windows.shape[1]), np.int32), np.zeros(shape, bool)
    for row, client in enumerate(client_ids.tolist()):
        held = _held(client_indices, client)
        rng = streams.host_rng(streams.POISSON_WINDOWS, seed, client, round)
        drawn = rng.random((local_steps, len(held))) < batch_size / len(held)
        count = drawn.sum(axis=1)
        if count.max(initial=0) > capacity:
            raise ValueError(
                f"client {client} drew {count.max()} windows for one step of round {round}, and a batch "
                f"has room for {capacity}: take a larger capacity"
            )
        mask[row] = np.arange(capacity) < count[:, None]
        tokens[row][mask[row]] = windows[held[np.nonzero(drawn)[1]]]  # both step by step
    num_examples = np.asarray([len(client_indices[client]) for client in client_ids.tolist()], np.int32)
    return PoissonBatches(tokens, mask, num_examples)


def poisson_capacity(num_examples: Sequence[int], *, batch_size: int, num_steps: int, failure: float = 1e-9) -> int:
    """Rows that hold every batch of a run, but with probability `failure`: the capacity of `poisson_client_batches`.

    num_examples: of all clients, windows held. num_steps: how many batches each draws at most over the run.

    Chernoff's bound of the binomial's tail, P[K >= k] <= exp(-n KL(k / n || q)), added up over all draws.
    """
    if not 0 < failure < 1 or num_steps < 1 or batch_size < 1 or min(num_examples) < 1:
        raise ValueError("expected 0 < failure < 1, and at least 1 for num_steps, batch_size and all num_examples")
    allowed = math.log(failure / (num_steps * len(num_examples)))

    def enough(n: int) -> int:
        capacity = min(n, batch_size)
        while capacity < n and -n * _binary_divergence((capacity + 1) / n, batch_size / n) > allowed:
            capacity += 1
        return capacity

    return max(enough(n) for n in {int(n) for n in num_examples})


def cohort(num_clients: int, cohort_size: int, *, round: int, seed: int) -> np.ndarray:
    """int64 [cohort_size], sorted: clients drawn without replacement for this round."""
    if not 1 <= cohort_size <= num_clients:
        raise ValueError(f"cohort_size is {cohort_size}: expected 1 to {num_clients}, the number of clients")
    rng = streams.host_rng(streams.COHORT, seed, round)
    return np.sort(rng.choice(num_clients, cohort_size, replace=False))


def poisson_cohort(num_clients: int, rate: float, *, round: int, seed: int) -> np.ndarray:
    """int64 [K], sorted: each client takes part with probability `rate`, independently of the others; K may be 0.

    The sampling that the privacy accounting of subsampled Gaussian noise assumes (Mironov et al. 2019,
    arXiv:1908.10530).
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate is {rate}: expected a probability above 0")
    rng = streams.host_rng(streams.POISSON_COHORT, seed, round)
    return np.flatnonzero(rng.random(num_clients) < rate)


def _join(
    tokenizer: Tokenizer, documents: list[str], seq_len: int, add_bos: bool, add_eos: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens int32 [N], the document of each int32 [N], and whether it is an added bos, bool [N]."""
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}: expected at least 1")
    opening = tokenizer.opening if add_bos else []
    closing = [] if not add_eos or tokenizer.eos_id is None else [tokenizer.eos_id]
    parts = [np.asarray(part, np.int32) for d in documents for part in (opening, tokenizer.encode(d), closing)]
    if not parts:
        raise ValueError("there are no documents")
    lengths = np.asarray([len(part) for part in parts])
    place = np.repeat(np.arange(len(parts)), lengths)
    return np.concatenate(parts), (place // 3).astype(np.int32), place % 3 == 0


def _held(client_indices: list[np.ndarray], client: int) -> np.ndarray:
    """The client's windows by number; ValueError for a client without."""
    if not 0 <= client < len(client_indices):
        raise ValueError(f"client {client} is not among the {len(client_indices)} clients")
    if len(client_indices[client]) == 0:
        raise ValueError(f"client {client} has no windows")
    return np.asarray(client_indices[client])


def _binary_divergence(a: float, b: float) -> float:
    """KL(a || b) of two coins, in nats; a in (0, 1], b in (0, 1)."""
    rest = 0.0 if a == 1 else (1 - a) * math.log((1 - a) / (1 - b))
    return a * math.log(a / b) + rest


def _walk(indices: np.ndarray, start: int, count: int, seed: int, client: int) -> np.ndarray:
    """int64 [count]: what stands at positions start ... of the client's endless walk through its windows."""
    epoch, offset = np.divmod(start + np.arange(count), len(indices))
    walk = np.empty(count, np.int64)
    for e in range(int(epoch[0]), int(epoch[-1]) + 1):
        order = streams.host_rng(streams.SHUFFLE, seed, client, e).permutation(len(indices))
        walk[epoch == e] = indices[order[offset[epoch == e]]]
    return walk
