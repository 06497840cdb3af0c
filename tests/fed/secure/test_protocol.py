"""Secure aggregation: exact sums with dropouts, what the server sees is uniform, and every lie is refused."""

import numpy as np
import pytest
from scipy import stats

from fmfl_jax.fed.secure import crypto, shamir
from fmfl_jax.fed.secure.client import KEYS_BYTES, PHASES, RECORD_BYTES, Client, Setup, advertised, pair_seed
from fmfl_jax.fed.secure.protocol import run_protocol
from fmfl_jax.fed.secure.server import Server
from fmfl_jax.fed.secure.wire import ProtocolError, pack_records, unpack_bits, unpack_records

IDS = (2, 5, 6, 11)


def vectors_of(ids, size, bits, seed=0):
    rng = np.random.default_rng(seed)
    return {client: rng.integers(0, 2**bits, size, dtype=np.uint64).astype(np.uint32) for client in ids}


def modular(vectors, ids, bits):
    total = np.zeros(next(iter(vectors.values())).shape, np.uint64)
    for client in ids:
        total += vectors[client]
    return (total % 2**bits).astype(np.uint32)


class Session:
    """The parties of one session, and every message they sent. `run` takes who is gone in a phase, and what the network
    makes of messages up and down."""

    def __init__(self, vectors, *, threshold=3, bits=32, seed=0):
        random = np.random.default_rng(seed).bytes
        self.vectors, self.keys = vectors, {client: random(32) for client in vectors}
        self.setup = Setup(
            session=random(16),
            threshold=threshold,
            modulus_bits=bits,
            verify_keys={client: crypto.verify_key(key) for client, key in self.keys.items()},
        )
        self.clients = {c: Client(c, key, self.setup, random=random) for c, key in self.keys.items()}
        self.server = Server(self.setup, len(next(iter(vectors.values()))))
        self.sent = {phase: {} for phase in PHASES}
        self.inbox = dict.fromkeys(vectors)

    def run(
        self,
        *,
        until=None,
        gone=lambda phase: (),
        up=lambda phase, client, message: message,
        down=lambda phase, client, message: message,
    ):
        while self.server.phase not in ("done", until):
            phase = self.server.phase
            for client, message in self.inbox.items():
                if client in gone(phase):
                    continue
                arguments = () if phase == PHASES[0] else (message,)
                arguments += (self.vectors[client],) if phase == "masked_input" else ()
                answer = up(phase, client, getattr(self.clients[client], phase)(*arguments))
                self.sent[phase][client] = answer
                self.server.receive(client, answer)
            self.inbox = {client: down(phase, client, message) for client, message in self.server.close().items()}
        return self

    def masked(self, client):
        return unpack_bits(self.sent["masked_input"][client], len(self.vectors[client]), self.setup.modulus_bits)


def changed(message: bytes, at: int) -> bytes:
    return message[:at] + bytes([message[at] ^ 1]) + message[at + 1 :]


def uniform_p(values: np.ndarray) -> float:
    """Of a chi-square test that all bytes are equally frequent."""
    return stats.chisquare(np.bincount(values.astype("<u4").view(np.uint8), minlength=256)).pvalue


def test_the_sum_is_exact_for_random_cohorts_moduli_and_dropouts():
    rng = np.random.default_rng(0)
    failed = 0
    for trial in range(25):
        ids = [int(i) for i in rng.choice(2**32, rng.integers(3, 9), replace=False)]
        threshold = int(rng.integers(len(ids) // 2 + 1, len(ids) + 1))
        bits = int(rng.integers(1, 33))
        vectors = vectors_of(ids, rng.integers(1, 40), bits, seed=trial)
        fate = rng.choice(3, len(ids), p=[0.75, 0.15, 0.1])
        early, late = ([c for c, f in zip(ids, fate) if f == kind] for kind in (1, 2))
        run = dict(
            threshold=threshold,
            modulus_bits=bits,
            drop_before_masking=early,
            drop_after_masking=late,
            random=np.random.default_rng(trial).bytes,
        )
        if len(ids) - len(early) - len(late) < threshold:
            with pytest.raises(ProtocolError, match="the threshold is"):
                run_protocol(vectors, **run)
            failed += 1
            continue
        result = run_protocol(vectors, **run)
        survivors = sorted(set(ids) - set(early))
        assert list(result.survivors) == survivors
        np.testing.assert_array_equal(result.total, modular(vectors, survivors, bits))
    assert 3 < failed < 20  # both kinds were seen


def test_vectors_longer_than_a_block_of_the_mask():
    vectors = vectors_of(IDS, 2**16 + 3, 32)
    result = run_protocol(vectors, threshold=3, modulus_bits=32, drop_before_masking=[5])
    np.testing.assert_array_equal(result.total, modular(vectors, (2, 6, 11), 32))


def test_bytes_counted_by_hand():
    result = run_protocol(vectors_of(IDS, 1001, 21), threshold=3, modulus_bits=21, drop_before_masking=[6])
    assert {phase: set(sizes.values()) for phase, sizes in result.bytes_up.items()} == {
        "advertise_keys": {32 + 32 + 64},
        "share_keys": {32 + 2 * 16 + 3 * (4 + 2 * 36 + 16 + 2 * 16)},
        "check_shares": {0},
        "masked_input": {(1001 * 21 + 7) // 8},
        "consistency_check": {64},
        "unmasking": {4 * (4 + 36)},
    }
    assert {phase: set(sizes.values()) for phase, sizes in result.bytes_down.items()} == {
        "advertise_keys": {4 * 132},
        "share_keys": {3 * 124},
        "check_shares": {4 * 4},
        "masked_input": {3 * 4},
        "consistency_check": {3 * 68},
        "unmasking": set(),
    }
    assert set(result.bytes_up["share_keys"]) == set(IDS) and set(result.bytes_up["masked_input"]) == {2, 5, 11}


def test_the_same_random_source_gives_the_same_bytes_and_another_one_does_not():
    vectors = vectors_of(IDS, 9, 32)
    one, two, three = (Session(vectors, seed=seed).run().sent for seed in (1, 1, 2))
    assert one == two
    assert all(one["masked_input"][client] != three["masked_input"][client] for client in IDS)


def test_masked_inputs_are_uniform_and_plain_ones_are_not():
    plain = {client: np.full(20_000, 3 + client, np.uint32) for client in IDS}
    other = {client: np.zeros(20_000, np.uint32) for client in IDS}
    one, two = (Session(vectors, seed=seed).run() for vectors, seed in ((plain, 1), (other, 2)))
    for client in IDS:
        assert uniform_p(one.masked(client)) > 1e-3 and uniform_p(two.masked(client)) > 1e-3
        assert stats.ks_2samp(one.masked(client), two.masked(client)).pvalue > 1e-3
        assert uniform_p(plain[client]) < 1e-12 and stats.ks_2samp(plain[client], other[client]).pvalue < 1e-12


def test_what_the_server_can_unmask_of_one_client_stays_uniform():
    """After a whole session the server knows the self masks of survivors, and the key of whoever dropped out early."""
    vectors = {client: np.full(20_000, client, np.uint32) for client in IDS}
    session = Session(vectors, seed=3)
    session.run(until="masked_input")
    # Client 6 does mask its vector, but the message comes too late.
    late = unpack_bits(session.clients[6].masked_input(session.inbox.pop(6), vectors[6]), 20_000, 32)
    session.run()
    np.testing.assert_array_equal(session.server.total, modular(vectors, (2, 5, 11), 32))
    records = {c: unpack_records(message, shamir.SHARE_BYTES) for c, message in session.sent["unmasking"].items()}
    secrets = dict(zip(IDS, shamir.join([1, 2, 4], [[records[c][owner] for c in (2, 5, 11)] for owner in IDS])))
    for client in (2, 5, 11):
        seen = session.masked(client)
        crypto.add_mask(seen, secrets[client], -1)
        assert uniform_p(seen) > 1e-3
    mask_keys = {c: message[32:64] for c, message in session.sent["advertise_keys"].items()}
    for peer in (2, 5, 11):  # of 6 the server has the key behind all its pairwise masks, not its self mask
        crypto.add_mask(late, pair_seed(session.setup, secrets[6], 6, mask_keys[peer], peer), -1 if 6 < peer else 1)
    assert uniform_p(late) > 1e-3
    crypto.add_mask(late, session.clients[6]._self_seed, -1)
    np.testing.assert_array_equal(late, vectors[6])  # so there was nothing else between it and the server


def in_phase(phase, client, change):
    """A network that changes one message."""
    return lambda p, c, message: change(message) if (p, c) == (phase, client) else message


def without(client):
    """Takes a client's record out of a list of keys."""
    return lambda message: pack_records({c: r for c, r in unpack_records(message, KEYS_BYTES).items() if c != client})


@pytest.mark.parametrize(
    "direction, phase, client, change, peer, text",
    [
        ("up", "advertise_keys", 5, lambda m: changed(m, 40), 5, "signature"),
        ("up", "advertise_keys", 5, lambda m: m[:-1], 5, "bytes"),
        (
            "down",
            "advertise_keys",
            5,
            lambda m: changed(m, 6),
            None,
            "server passes on keys .* not client 2's",
        ),  # the server forges a key of client 2
        ("down", "advertise_keys", 5, lambda m: m[:132] + m, None, "twice"),
        ("down", "advertise_keys", 5, lambda m: m[: 2 * 132], None, "threshold"),
        ("down", "advertise_keys", 5, without(5), None, "my own keys"),
        ("up", "share_keys", 5, lambda m: m[: 64 + 4 + RECORD_BYTES], 5, "exactly the other"),
        ("up", "share_keys", 5, lambda m: m[:63], 5, "shares of 63 bytes"),
        (
            "down",
            "share_keys",
            11,
            lambda m: (3).to_bytes(4, "little") + m[4:],
            None,
            "client 3, who advertised no keys",
        ),
        ("down", "share_keys", 11, lambda m: m[: 4 + RECORD_BYTES], None, "no shares are held of .5, 6."),
        ("up", "check_shares", 5, lambda m: (5).to_bytes(4, "little"), 5, "complains"),
        ("down", "check_shares", 11, lambda m: m[:12], None, "goes on without me"),
        ("down", "check_shares", 11, lambda m: m[8:], None, "threshold"),
        ("down", "check_shares", 11, lambda m: m + (99).to_bytes(4, "little"), None, "no shares are held of .99."),
        ("up", "masked_input", 6, lambda m: m[:-1], 6, "bytes"),
        ("down", "masked_input", 6, lambda m: m[:8] + m[12:], None, "refuses: .* is lost"),
        ("down", "masked_input", 6, lambda m: m[4:8] * 3, None, "twice"),
        ("down", "masked_input", 6, lambda m: m[:12] + (12).to_bytes(4, "little"), None, "no shares"),
        ("down", "masked_input", 6, lambda m: m[4:], 6, "signature"),  # it is told a list without client 2
        ("up", "consistency_check", 6, lambda m: changed(m, 0), 6, "signature"),
        ("up", "consistency_check", 6, lambda m: m[:-1], 6, "signature"),
        ("down", "consistency_check", 6, lambda m: changed(m, 5), None, "a list of .* not client 2's"),
        ("down", "consistency_check", 6, lambda m: m[:68], None, "threshold"),
        ("up", "unmasking", 2, lambda m: changed(m, 4), 2, "share of client 2's secret is not the one"),
        ("up", "unmasking", 2, lambda m: m[40:], 2, "exactly the clients"),
    ],
)
def test_lies_are_refused_and_name_the_peer(direction, phase, client, change, peer, text):
    session = Session(vectors_of(IDS, 5, 32))
    with pytest.raises(ProtocolError, match=text) as error:
        session.run(**{direction: in_phase(phase, client, change)})
    assert error.value.peer == peer


def test_the_server_goes_on_without_a_client_that_cheats():
    vectors = vectors_of(IDS, 5, 32)
    session = Session(vectors).run(until="masked_input")
    good = session.clients[5].masked_input(session.inbox.pop(5), vectors[5])
    with pytest.raises(ProtocolError, match="client 5"):
        session.server.receive(5, good + b"x")
    session.run()
    np.testing.assert_array_equal(session.server.total, modular(vectors, (2, 6, 11), 32))


def test_second_messages_and_strangers_are_refused():
    session = Session(vectors_of(IDS, 5, 32)).run(until="masked_input")
    message = session.clients[2].masked_input(session.inbox[2], session.vectors[2])
    session.server.receive(2, message)
    for sender, text in ((2, "second message"), (3, "no part")):
        with pytest.raises(ProtocolError, match=text) as error:
            session.server.receive(sender, message)
        assert error.value.peer == sender


def test_nobody_gets_both_shares_of_a_client():
    """Two lists of survivors, one with client 11 and one without, would tell its key and its self mask."""
    with_it, without_it = (pack_records(dict.fromkeys(ids, b"")) for ids in (IDS, IDS[:3]))
    session = Session(vectors_of(IDS, 5, 32)).run(until="consistency_check")
    client = session.clients[2]
    client.consistency_check(with_it)
    with pytest.raises(ProtocolError, match="not the time"):
        client.consistency_check(without_it)
    with pytest.raises(ProtocolError, match="not the time"):  # and nothing after that
        client.unmasking(b"")
    session = Session(vectors_of(IDS, 5, 32)).run()
    for client in IDS:
        shares = unpack_records(session.sent["unmasking"][client], shamir.SHARE_BYTES)
        assert set(shares) == set(IDS)  # one of each
        with pytest.raises(ProtocolError, match="not the time"):
            session.clients[client].unmasking(session.inbox.get(client, b""))


def test_an_error_is_the_end_for_a_client():
    session = Session(vectors_of(IDS, 5, 32)).run(until="masked_input")
    with pytest.raises(ProtocolError):
        session.clients[2].masked_input(changed(session.inbox[2], 0), session.vectors[2])
    with pytest.raises(ProtocolError, match="not the time"):
        session.clients[2].masked_input(session.inbox[2], session.vectors[2])


@pytest.mark.parametrize(
    "keys, text",
    [
        (lambda session: bytes(64), "public key is not one"),  # of low order: known exchange
        (lambda session: session.sent["advertise_keys"][2][:64], "not its own"),
    ],
)
def test_keys_that_would_stop_everybody_are_refused(keys, text):
    session = Session(vectors_of(IDS, 5, 32))

    def up(phase, client, message):
        if (phase, client) != ("advertise_keys", 5):
            return message
        forged = keys(session)
        return forged + crypto.sign(session.keys[5], advertised(session.setup, 5, forged))

    with pytest.raises(ProtocolError, match=text) as error:
        session.run(up=up)
    assert error.value.peer == 5


def test_keys_of_another_session_are_refused():
    old, new = (Session(vectors_of(IDS, 5, 32), seed=seed) for seed in (0, 1))
    new.setup.verify_keys.update(old.setup.verify_keys)  # the same identities
    with pytest.raises(ProtocolError, match="signature"):
        new.server.receive(2, old.clients[2].advertise_keys())


def test_clients_can_vanish_in_every_phase():
    vectors = vectors_of((*IDS, 20, 21, 22), 6, 32)
    leaves = {20: "share_keys", 21: "consistency_check", 22: "unmasking", 11: "masked_input"}
    gone = lambda phase: {c for c, at in leaves.items() if PHASES.index(at) <= PHASES.index(phase)}
    session = Session(vectors, threshold=3, seed=4)
    with pytest.raises(ProtocolError, match="no majority"):
        session.run(gone=gone)
    session = Session(vectors | vectors_of((30,), 6, 32), threshold=5, seed=4)
    with pytest.raises(ProtocolError, match="4 of 5 clients are left"):
        session.run(gone=gone)
    del leaves[22]
    session = Session(vectors | vectors_of((30,), 6, 32), threshold=5, seed=4).run(gone=gone)
    np.testing.assert_array_equal(session.server.total, modular(session.vectors, (2, 5, 6, 21, 22, 30), 32))


def test_arguments_that_do_not_fit():
    vectors = vectors_of(IDS, 5, 8)
    for change, text in (
        (dict(threshold=1), "threshold"),
        (dict(modulus_bits=33), "modulus_bits"),
        (dict(drop_before_masking=[3]), "drops out"),
        (dict(modulus_bits=2), "below 2"),
        (dict(drop_before_masking=[2], drop_after_masking=[2]), "drops out"),
    ):
        with pytest.raises(ValueError, match=text):
            run_protocol(vectors, **(dict(threshold=3, modulus_bits=8) | change))
    with pytest.raises(ValueError, match="shapes differ"):
        run_protocol(vectors | {7: np.zeros(4, np.uint32)}, threshold=3, modulus_bits=8)
