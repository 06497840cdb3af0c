"""Windows count every token once; batches and cohorts are functions of (seed, round, client)."""

import dataclasses
import time

import numpy as np
import pytest
from scipy import stats

from fmfl_jax.data import batches, corpora, tokenizers

BYTES = tokenizers.byte_tokenizer()
# Bytes with two more ids, so that the opening and closing of documents can be seen.
MARKED = dataclasses.replace(BYTES, vocab_size=258, bos_id=256, eos_id=257, add_bos=True)
DOCUMENTS = ["abcdefg", "hé", "ijklmnopqrstuvw"]


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("add_eos", [False, True])
@pytest.mark.parametrize("seq_len", [1, 2, 3, 5, 8, 24, 40])
def test_every_token_is_predicted_once(add_bos, add_eos, seq_len):
    stream = []
    for document in DOCUMENTS:
        stream += [256] * add_bos + list(document.encode()) + [257] * add_eos
    evaluation = batches.evaluation_windows(MARKED, DOCUMENTS, seq_len, add_bos=add_bos, add_eos=add_eos)
    assert evaluation.windows.dtype == np.int32 and evaluation.windows.shape[1] == seq_len + 1
    assert evaluation.mask.shape == (-(-(len(stream) - 1) // seq_len), seq_len)
    assert evaluation.windows[:, 1:][evaluation.mask].tolist() == [t for t in stream[1:] if t != 256]
    context = evaluation.windows[:, :-1].reshape(-1)[: len(stream) - 1]
    assert context.tolist() == stream[:-1]
    assert evaluation.num_bytes == sum(len(d.encode()) for d in DOCUMENTS)

    if len(stream) <= seq_len:
        with pytest.raises(ValueError, match=f"{len(stream)} tokens: expected at least seq_len \\+ 1 = {seq_len + 1}"):
            batches.token_windows(MARKED, DOCUMENTS, seq_len, add_bos=add_bos, add_eos=add_eos)
        return
    training = batches.token_windows(MARKED, DOCUMENTS, seq_len, add_bos=add_bos, add_eos=add_eos)
    num_windows = len(training.windows)
    assert num_windows == (len(stream) - 1) // seq_len
    np.testing.assert_array_equal(training.windows, evaluation.windows[:num_windows])
    assert training.windows.dtype == training.document_id.dtype == np.int32


def test_marks_only_where_the_tokenizer_has_them():
    plain = batches.token_windows(BYTES, DOCUMENTS, 4, add_bos=True, add_eos=True)
    unmarked = batches.token_windows(MARKED, DOCUMENTS, 4, add_bos=False, add_eos=False)
    np.testing.assert_array_equal(plain.windows, unmarked.windows)


def test_window_belongs_to_the_document_of_most_of_it():
    rng = np.random.default_rng(0)
    documents = [chr(65 + i) * int(rng.integers(1, 30)) for i in range(26)]
    windows, document_id = batches.token_windows(BYTES, documents, 9, add_bos=False, add_eos=False)
    counts = np.stack([(windows == 65 + i).sum(1) for i in range(26)], axis=1)
    majority = counts.max(1) > 5
    assert majority.sum() > 10
    np.testing.assert_array_equal(document_id[majority], counts.argmax(1)[majority])
    assert (np.diff(document_id) >= 0).all()


def test_bad_windows():
    with pytest.raises(ValueError, match="seq_len is 0"):
        batches.token_windows(BYTES, DOCUMENTS, 0, add_bos=False, add_eos=False)
    with pytest.raises(ValueError, match="no documents"):
        batches.token_windows(BYTES, [], 4, add_bos=False, add_eos=False)
    with pytest.raises(ValueError, match="1 tokens"):
        batches.evaluation_windows(BYTES, ["a"], 4, add_bos=False, add_eos=False)


WINDOWS = np.arange(100, dtype=np.int32)[:, None] * 10 + np.arange(6, dtype=np.int32)
CLIENTS = [np.arange(0, 50), np.arange(50, 53), np.arange(53, 100), np.asarray([7])]
ROUND = {"local_steps": 2, "batch_size": 3, "seed": 5}


def test_client_walks_through_its_windows_epoch_by_epoch():
    rounds = [batches.client_batches(WINDOWS, CLIENTS, round=r, **ROUND) for r in range(25)]
    assert rounds[0].tokens.shape == (4, 2, 3, 6) and rounds[0].tokens.dtype == np.int32
    assert rounds[0].num_examples.tolist() == [50, 3, 47, 1] and rounds[0].num_examples.dtype == np.int32
    walked = np.concatenate([r.tokens.reshape(4, 6, 6) for r in rounds], axis=1)  # [C, positions, T + 1]
    np.testing.assert_array_equal(walked, WINDOWS[walked[:, :, 0] // 10])
    for client, held in enumerate(CLIENTS):
        numbers = walked[client, :, 0] // 10
        epochs = numbers[: len(numbers) // len(held) * len(held)].reshape(-1, len(held))
        np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(held, (len(epochs), 1)))
        if len(held) > 1:
            assert len(np.unique(epochs, axis=0)) > 1  # reshuffled


def test_batches_depend_on_client_round_and_seed_only():
    everybody = batches.client_batches(WINDOWS, CLIENTS, round=9, **ROUND)
    for ids in ([2, 0], [3], [1, 3, 0, 2]):
        some = batches.client_batches(WINDOWS, CLIENTS, client_ids=np.asarray(ids), round=9, **ROUND)
        np.testing.assert_array_equal(some.tokens, everybody.tokens[ids])
        np.testing.assert_array_equal(some.num_examples, everybody.num_examples[ids])
    other_seed = batches.client_batches(WINDOWS, CLIENTS, round=9, **{**ROUND, "seed": 6})
    assert not np.array_equal(other_seed.tokens, everybody.tokens)
    # Two clients with the same windows do not walk in step.
    twins = batches.client_batches(WINDOWS, [CLIENTS[0], CLIENTS[0]], round=0, **ROUND).tokens
    assert not np.array_equal(twins[0], twins[1])


def test_bad_clients():
    with pytest.raises(ValueError, match="client 1 has no windows"):
        batches.client_batches(WINDOWS, [CLIENTS[0], np.asarray([], np.int64)], round=0, **ROUND)
    for client in (-1, 4):
        with pytest.raises(ValueError, match=f"client {client} is not among the 4 clients"):
            batches.client_batches(WINDOWS, CLIENTS, client_ids=np.asarray([client]), round=0, **ROUND)


def test_thousands_of_clients_are_quick():
    windows = np.zeros((40_000, 129), np.int32)
    clients = np.array_split(np.arange(len(windows)), 4000)
    start = time.process_time()
    tokens, _ = batches.client_batches(windows, clients, round=3, local_steps=4, batch_size=4, seed=0)
    assert tokens.shape == (4000, 4, 4, 129)
    assert time.process_time() - start < 5  # about 0.3 s when measured; the bound only catches a blow-up


def test_cohort():
    drawn = [batches.cohort(20, 5, round=r, seed=1) for r in range(2000)]
    for clients in drawn:
        assert (np.diff(clients) > 0).all() and len(clients) == 5
    np.testing.assert_array_equal(drawn[3], batches.cohort(20, 5, round=3, seed=1))
    np.testing.assert_allclose(np.bincount(np.concatenate(drawn), minlength=20) / 2000, 0.25, atol=0.05)
    np.testing.assert_array_equal(batches.cohort(20, 20, round=0, seed=1), np.arange(20))
    for size in (0, 21):
        with pytest.raises(ValueError, match=f"cohort_size is {size}"):
            batches.cohort(20, size, round=0, seed=1)


def test_poisson_cohort():
    """Sizes are binomial: mean 20 x 0.25 = 5, variance 20 x 0.25 x 0.75 = 3.75."""
    drawn = [batches.poisson_cohort(20, 0.25, round=r, seed=1) for r in range(4000)]
    counts = np.asarray([len(clients) for clients in drawn])
    np.testing.assert_allclose([counts.mean(), counts.var()], [5, 3.75], rtol=0.06)
    np.testing.assert_array_equal(drawn[3], batches.poisson_cohort(20, 0.25, round=3, seed=1))
    np.testing.assert_array_equal(batches.poisson_cohort(20, 1.0, round=0, seed=1), np.arange(20))
    with pytest.raises(ValueError, match="rate is 0"):
        batches.poisson_cohort(20, 0, round=0, seed=1)


def test_poisson_client_batches():
    """Every window joins every step with q = batch_size / n, whatever else is drawn: means, sizes, independence."""
    clients = [np.arange(0, 40), np.arange(40, 50), np.asarray([7])]
    counts = np.zeros((1500, 100))  # of each window in each step
    args = {"local_steps": 3, "batch_size": 4, "capacity": 30, "seed": 2}
    for r in range(500):
        drawn = batches.poisson_client_batches(WINDOWS, clients, round=r, **args)
        assert drawn.tokens.shape == (3, 3, 30, 6) and drawn.num_examples.tolist() == [40, 10, 1]
        assert drawn.tokens.dtype == np.int32 and not drawn.tokens[~drawn.mask].any()
        np.testing.assert_array_equal(drawn.tokens[drawn.mask] % 10, np.tile(np.arange(6), (drawn.mask.sum(), 1)))
        for client, held in enumerate(clients[:2]):
            for step in range(3):
                numbers = drawn.tokens[client, step, drawn.mask[client, step], 0] // 10
                assert np.isin(numbers, held).all() and len(np.unique(numbers)) == len(numbers)
                counts[3 * r + step, numbers] += 1
        assert (drawn.tokens[2, :, 0] == WINDOWS[7]).all() and (drawn.mask[2].sum(axis=1) == 1).all()  # q = 1
    np.testing.assert_allclose(counts[:, :40].mean(axis=0), 0.1, atol=4.5 * np.sqrt(0.1 * 0.9 / 1500))
    np.testing.assert_allclose(counts[:, 40:50].mean(axis=0), 0.4, atol=4.5 * np.sqrt(0.4 * 0.6 / 1500))
    size = counts[:, :40].sum(axis=1)  # binomial if independent
    np.testing.assert_allclose(size.var(), 40 * 0.1 * 0.9, rtol=0.2)
    assert abs(np.corrcoef(size[:-1], size[1:])[0, 1]) < 0.12  # steps and rounds are independent


def test_poisson_batches_depend_on_client_round_and_seed_only():
    kwargs = {"round": 3, "local_steps": 2, "batch_size": 3, "capacity": 20, "seed": 5}
    everybody = batches.poisson_client_batches(WINDOWS, CLIENTS, **kwargs)
    some = batches.poisson_client_batches(WINDOWS, CLIENTS, client_ids=np.asarray([3, 0]), **kwargs)
    for all_of_them, these in zip(everybody, some):
        np.testing.assert_array_equal(these, all_of_them[[3, 0]])
    for other in ({"round": 4}, {"seed": 6}):
        drawn = batches.poisson_client_batches(WINDOWS, CLIENTS, **kwargs | other)
        assert not np.array_equal(drawn.tokens, everybody.tokens)
    twins = batches.poisson_client_batches(WINDOWS, [CLIENTS[0], CLIENTS[0]], **kwargs)
    assert not np.array_equal(twins.tokens[0], twins.tokens[1])
    with pytest.raises(ValueError, match="room for 1: take a larger capacity"):
        batches.poisson_client_batches(WINDOWS, CLIENTS, **kwargs | {"capacity": 1})
    with pytest.raises(ValueError, match="client 4 is not among"):
        batches.poisson_client_batches(WINDOWS, CLIENTS, client_ids=np.asarray([4]), **kwargs)


@pytest.mark.parametrize("sizes, num_steps", [([40, 1000, 7], 300), ([100_000], 10**5), ([3, 4], 5)])
def test_poisson_capacity_against_the_exact_tail(sizes, num_steps):
    """The union bound of the exact tails holds, and Chernoff's bound costs few rows."""
    failure = 1e-6
    capacity = batches.poisson_capacity(sizes, batch_size=8, num_steps=num_steps, failure=failure)

    def overflow(rows):
        return num_steps * sum(stats.binom.sf(rows, n, min(1.0, 8 / n)) for n in sizes)

    assert overflow(capacity) <= failure
    assert capacity == max(min(n, 8) for n in sizes) or overflow(capacity - 4) > failure


def test_evaluation_of_wikitext(shared_data):
    """Whole files: bytes are the file's, and the mask counts each token but the first."""
    path = shared_data / "wikitext2/wiki.valid.tokens"
    tokenizer = tokenizers.load_tokenizer(shared_data / "ckpt/TinyStories-656K")
    documents = corpora.load_documents(path)
    evaluation = batches.evaluation_windows(tokenizer, documents, 128, add_bos=True, add_eos=False)
    assert evaluation.num_bytes == path.stat().st_size
    assert evaluation.mask.sum() == sum(len(tokenizer.encode(document)) for document in documents)
