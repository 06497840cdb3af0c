"""Liars in secure aggregation: the sum of the others is found, the right party is named, and where it must end."""

import numpy as np
import pytest

from fmfl_jax.fed.secure import crypto, shamir
from fmfl_jax.fed.secure.client import (
    COMMITMENT_BYTES,
    RECORD_BYTES,
    SEALED_BYTES,
    SHARE_HASH_BYTES,
    Client,
    share_hash,
)
from fmfl_jax.fed.secure.protocol import run_protocol
from fmfl_jax.fed.secure.server import _without_conflicts
from fmfl_jax.fed.secure.wire import ProtocolError, pack_records, unpack_records
from tests.fed.secure.test_protocol import changed, modular, vectors_of

IDS = (1, 4, 6, 9, 13, 20, 27, 31, 40)
HEAD = COMMITMENT_BYTES + 2 * SHARE_HASH_BYTES


def liars(lies):
    """make_client for {client: {phase: change of its message, which sees the client}}."""

    def make(client_id, *args, **kwargs):
        client = Client(client_id, *args, **kwargs)
        for phase, change in lies.get(client_id, {}).items():
            honest = getattr(client, phase)
            setattr(client, phase, lambda *a, honest=honest, change=change: change(client, honest(*a)))
        return client

    return make


def run(lies, *, threshold=5, ids=IDS, **dropouts):
    vectors = vectors_of(ids, 7, 20)
    random = np.random.default_rng(len(lies)).bytes
    result = run_protocol(
        vectors, threshold=threshold, modulus_bits=20, random=random, make_client=liars(lies), **dropouts
    )
    np.testing.assert_array_equal(result.total, modular(vectors, result.survivors, 20))
    return result


def wrong_unmasking(owner):
    """A wrong share of one owner's secret."""

    def change(client, message):
        records = unpack_records(message, shamir.SHARE_BYTES)
        return pack_records(records | {owner: changed(records[owner], 0)})

    return {"unmasking": change}


def bad_shares(receivers, at=0):
    """Sealed shares (at < 88) or their hashes (from 88) that are wrong for some receivers."""

    def change(client, message):
        records = unpack_records(message[HEAD:], RECORD_BYTES)
        return message[:HEAD] + pack_records(
            {c: changed(record, at) if c in receivers else record for c, record in records.items()}
        )

    return {"share_keys": change}


def accuses(peers):
    return {"check_shares": lambda client, message: pack_records(dict.fromkeys(peers, b""))}


def deals_no_polynomial(receivers):
    """Random shares to some, well sealed and with the right hashes."""

    def change(client, message):
        records = unpack_records(message[HEAD:], RECORD_BYTES)
        for peer in receivers:
            pair = bytes(range(2 * shamir.SHARE_BYTES))
            of_key, of_seed = pair[: shamir.SHARE_BYTES], pair[shamir.SHARE_BYTES :]
            sealed = crypto.seal(client._channel(client.client_id, peer), pair, client._transcript)
            records[peer] = sealed + share_hash(of_key) + share_hash(of_seed)
        return message[:HEAD] + pack_records(records)

    return {"share_keys": change}


def test_wrong_shares_up_to_the_last_one_that_can_be_spared():
    """9 clients, threshold 5: 4 liars, whoever they are and whoever answers first, change nothing; 5 end it."""
    rng = np.random.default_rng(0)
    for count in range(1, 5):
        who = [int(c) for c in rng.choice(IDS, count, replace=False)]
        result = run({c: wrong_unmasking(int(rng.choice(IDS))) for c in who})
        assert set(result.excluded) == set(who) and result.survivors == IDS
        assert all("is not the one that it accepted" in reason for reason in result.excluded.values())
    first = IDS[:3]  # with a client that vanished before masking, whose key the others put together, and one after it
    result = run({c: wrong_unmasking(20) for c in first}, threshold=6, drop_before_masking=[20], ids=(*IDS, 50))
    assert set(result.excluded) == set(first) and 20 not in result.survivors
    with pytest.raises(ProtocolError, match="unmasking: 4 of 9 .* threshold is 5; excluded client 1 .*; excluded") as e:
        run({c: wrong_unmasking(31) for c in IDS[:5]})
    assert e.value.peer is None and all(f"client {c} (" in str(e.value) for c in IDS[:5])
    assert not any(f"client {c} (" in str(e.value) for c in IDS[5:])  # the owner, 31, among them


@pytest.mark.parametrize("at", [0, SEALED_BYTES - 1, SEALED_BYTES, RECORD_BYTES - 1])
def test_the_sender_of_bad_sealed_shares_is_left_out(at):
    for receivers in (IDS, IDS[4:], (31, 40), (1,)):
        result = run({6: bad_shares(receivers, at)})
        assert list(result.excluded) == [6] and result.survivors == tuple(c for c in IDS if c != 6)
        assert str(sorted(set(receivers) - {6})) in result.excluded[6]
    result = run({c: bad_shares(IDS, at) for c in IDS[:4]})
    assert set(result.excluded) == set(IDS[:4]) and result.survivors == IDS[4:]
    with pytest.raises(
        ProtocolError, match="check_shares: 4 of 9 clients are left, the threshold is 5; excluded client 1"
    ):
        run({c: bad_shares(IDS, at) for c in IDS[:5]})


def test_false_accusations():
    result = run({6: accuses([1, 4, 9])})
    assert list(result.excluded) == [6] and "it alone finds those of [1, 4, 9] bad" in result.excluded[6]
    assert list(run({6: accuses([1])}).excluded) == [1]  # nobody can tell that 6 lies: one honest client is lost
    result = run({6: accuses([1, 4, 9]), 9: bad_shares([1, 4, 6, 13]), 31: {"masked_input": lambda c, m: m[1:]}})
    assert set(result.excluded) == {6, 9, 31} and result.survivors == (1, 4, 13, 20, 27, 40)


def test_after_the_check_of_shares_no_two_disagree_and_honest_clients_are_rarely_lost():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(3, 12))
        bad = set(rng.choice(n, rng.integers(0, n), replace=False).tolist())
        complaints = {
            c: {d for d in range(n) if d != c and (c in bad or d in bad) and rng.random() < 0.4} for c in range(n)
        }
        stay, without = _without_conflicts(complaints)
        assert sorted([*stay, *without]) == list(range(n))
        assert not any(complaints[c] & set(stay) for c in stay)
        if len(bad) == 1:
            (liar,) = bad
            touched = {c for c in range(n) if liar in complaints[c] or c in complaints[liar]}
            assert set(without) == (bad if len(touched) > 1 else set(without)) and len(without) == bool(touched)


@pytest.mark.parametrize("vanishes", [False, True])
def test_an_owner_whose_shares_do_not_belong_together_costs_a_session_and_is_named(vanishes):
    lies = {4: deals_no_polynomial((1, 6)), 9: deals_no_polynomial((1, 40)), 27: wrong_unmasking(1)}
    result = run(lies, drop_before_masking=[4] if vanishes else [], drop_after_masking=[13])
    assert set(result.excluded) == {4, 9, 27} and result.survivors == (1, 6, 20, 31, 40)
    assert "it dealt do not belong together" in result.excluded[4]
    assert result.bytes_up["masked_input"][1] == 2 * result.bytes_up["masked_input"][13]  # two sessions
    with pytest.raises(ProtocolError, match="advertise_keys: 4 of 4 .* threshold is 5; excluded client 4 "):
        run(lies | {6: deals_no_polynomial((1, 40))}, drop_after_masking=[13])


def test_malformed_messages_of_several_clients_in_every_phase():
    cut = {phase: lambda client, message: message[:-1] for phase in ("advertise_keys",)}
    lies = {
        1: cut,
        4: {"share_keys": cut["advertise_keys"]},
        6: {"check_shares": lambda client, message: b"x"},
        9: {"consistency_check": cut["advertise_keys"]},
    }
    result = run(lies)
    assert set(result.excluded) == {1, 4, 6, 9} and result.survivors == (9, 13, 20, 27, 31, 40)
    assert [why.split(":")[0] for _, why in sorted(result.excluded.items())] == [
        "advertise_keys",
        "share_keys",
        "check_shares",
        "consistency_check",
    ]
