"""GF(256) against polynomials, random combinations against what was sent, sends against closed forms and simulation."""

import numpy as np
import pytest

from fmfl_jax.transport.weights import fountain
from fmfl_jax.transport.weights.broadcast import arq_sends, fountain_sends, ideal_sends
from fmfl_jax.transport.weights.progressive import first_answer_s


def multiplied(a, b):
    """Polynomials over GF(2) modulo x^8 + x^4 + x^3 + x^2 + 1."""
    product = 0
    for bit in range(8):
        product ^= (a << bit) * (b >> bit & 1)
    for bit in range(15, 7, -1):
        if product >> bit & 1:
            product ^= 0x11D << bit - 8
    return product


def test_the_field():
    assert all(fountain.PRODUCTS[a, b] == multiplied(a, b) for a in range(256) for b in range(a, 256))
    assert np.array_equal(fountain.PRODUCTS, fountain.PRODUCTS.T)
    assert all(fountain.PRODUCTS[a, fountain.INVERSES[a]] == 1 for a in range(1, 256))


@pytest.mark.parametrize("loss", [0.0, 0.3, 1.0])
def test_what_arrives_is_what_was_sent(loss):
    """With loss 1 of the chunks themselves: from combinations alone."""
    rng = np.random.default_rng(7)
    chunks = rng.integers(0, 256, (23, 50), dtype=np.uint8)
    decoder, received = fountain.Decoder(23, 50, seed=3), 0
    for number in range(200):
        if number < 23 and rng.random() < loss:
            continue
        received += 1
        ranked = decoder.rank
        done = decoder.add(number, fountain.symbol(chunks, number, seed=3))
        assert decoder.rank - ranked in (0, 1) and done == (decoder.rank == 23)
        if not done:
            with pytest.raises(ValueError, match="independent symbols of 23"):
                decoder.chunks()
        else:
            break
    assert received <= 24
    np.testing.assert_array_equal(decoder.chunks(), chunks)
    decoder.add(number, fountain.symbol(chunks, number, seed=3))  # one too many changes nothing
    np.testing.assert_array_equal(decoder.chunks(), chunks)


def test_random_rows_are_independent_as_often_as_they_should_be():
    """Square matrices of 6 symbols: prod (1 - 256^-i) = .99608."""
    full = 0
    for seed in range(4000):
        decoder = fountain.Decoder(6, 1, seed)
        full += [decoder.add(100 + i, np.zeros(1, np.uint8)) for i in range(6)][-1]
    expected = np.prod(1 - 256.0 ** -np.arange(1, 7))
    assert abs(full / 4000 - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000)


def test_sends_of_the_closed_forms():
    twenty, fifty = np.full(20, 0.1), np.full(50, 0.2)
    assert arq_sends(twenty) == pytest.approx(2.08255, abs=5e-6)
    assert arq_sends(fifty) == pytest.approx(3.29767, abs=5e-6)
    assert ideal_sends(twenty, 100) == pytest.approx(1.18190, abs=5e-6)
    assert ideal_sends(fifty, 1000) == pytest.approx(1.29081, abs=5e-6)
    assert 1.0 < fountain_sends(twenty, 100) / ideal_sends(twenty, 100) < 1.001
    assert arq_sends([0.0]) == ideal_sends([0.0, 0.0], 5) == 1.0
    assert arq_sends([0.5]) == pytest.approx(2.0) and ideal_sends([0.5], 7) == pytest.approx(2.0)
    for bad in ([1.0], [], [-0.1], [np.nan]):
        with pytest.raises(ValueError, match="probabilities below 1"):
            arq_sends(bad)


def test_sends_of_a_simulated_broadcast():
    """Real elimination at receivers of different losses, against the closed form."""
    loss, chunks, sends = np.asarray([0.02, 0.1, 0.3]), 12, []
    rng = np.random.default_rng(11)
    for seed in range(400):
        receivers = [fountain.Decoder(chunks, 1, seed) for _ in loss]
        waiting, number = set(range(len(loss))), 0
        while waiting:
            for u in list(waiting):
                if rng.random() >= loss[u] and receivers[u].add(number, np.zeros(1, np.uint8)):
                    waiting.remove(u)
            number += 1
        sends.append(number / chunks)
    error = np.std(sends) / np.sqrt(len(sends))
    assert abs(np.mean(sends) - fountain_sends(loss, chunks)) < 4 * error


def test_computing_while_layers_arrive():
    bits = 8e6 * np.asarray([20, 10, 10, 10, 10, 20])
    early, late = first_answer_s(bits, 40e6, [0.1, 0.5, 0.5, 0.5, 0.5, 0.2])
    assert early == pytest.approx(16.2) and late == pytest.approx(18.3)
    early, late = first_answer_s(bits, np.asarray([40e6, 1e12]), [0.1, 0.5, 0.5, 0.5, 0.5, 0.2])
    assert early[1] == pytest.approx(2.3, abs=1e-2) and early.shape == late.shape == (2,)
