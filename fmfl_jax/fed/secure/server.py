"""The server of secure aggregation (Bonawitz et al., CCS 2017, figure 4): it passes messages on and learns the sum.

    sum_{u in U3} x_u = sum_{u in U3} (y_u - PRG(b_u)) + sum_{u in U2 - U3, v in U3} +-PRG(s_uv)   mod 2^m

U1, U2, U3, U4: those who advertised keys, shared them and stay after the check of shares, sent a masked input, signed
the list of U3.
"""

import numpy as np

from fmfl_jax.fed.secure import crypto, shamir
from fmfl_jax.fed.secure.client import (
    COMMITMENT_BYTES,
    KEYS_BYTES,
    PHASES,
    RECORD_BYTES,
    SEALED_BYTES,
    SHARE_HASH_BYTES,
    Setup,
    advertised,
    agreed,
    commitment,
    pair_seed,
    pair_sign,
    share_hash,
    transcript,
    verify_by,
)
from fmfl_jax.fed.secure.wire import ProtocolError, pack_records, unpack_bits, unpack_records


class Server:
    """One session. In every phase of PHASES: `receive` each client's message, then `close` the phase, which gives the
    messages for those who took part. Who is missing has dropped out. After the last phase `total`, uint32 [num_values],
    is the sum of the vectors of `survivors`.

    `excluded` {client: reason} names those whose message was refused, or with whom the session does not go on. With n
    clients any n - threshold of them may vanish, send malformed messages, shares that cannot be opened, or wrong shares
    when unmasking: the sum of the others is found. Two things cost more. Who is right when a client says that another's
    shares are bad, nobody can prove: see `_without_conflicts`. And an owner whose shares all match its hashes but do
    not belong together shows itself only at the end: `close` then names it, and it takes a new session without it.
    """

    def __init__(self, setup: Setup, num_values: int):
        self._setup, self._num_values = setup, num_values
        self._phase = 0
        self._allowed, self._received = set(setup.verify_keys), {}
        self._seen_keys = set()
        self._masked_total = np.zeros(num_values, np.uint32)
        self.total: np.ndarray | None = None
        self.survivors: tuple[int, ...] = ()
        self.excluded: dict[int, str] = {}

    @property
    def phase(self) -> str:
        """The phase that is open; "done" after the last."""
        return PHASES[self._phase] if self._phase < len(PHASES) else "done"

    def receive(self, sender: int, message: bytes):
        """Takes the sender's message of the open phase (who the sender is, the transport knows).

        Raises ProtocolError naming the sender if it may not send, sent already, or sent what is not valid. Nothing is
        changed then: the session can go on without it.
        """
        if self.phase == "done" or sender not in self._allowed:
            raise ProtocolError(f"it takes no part in the phase {self.phase}", sender)
        if sender in self._received:
            raise ProtocolError(f"a second message in the phase {self.phase}", sender)
        try:
            self._received[sender] = getattr(self, f"_take_{self.phase}")(sender, message)
        except ProtocolError as error:
            self.excluded[sender] = f"{self.phase}: {error.reason}"
            raise
        self.excluded.pop(sender, None)  # its second try was good

    def close(self) -> dict[int, bytes]:
        """Ends the phase: {client: message to it}, empty after the last.

        Raises ProtocolError with fewer than `threshold` left, and naming the owner where a secret cannot be put
        together; `excluded` then names all such owners.
        """
        received = dict(sorted(self._received.items()))
        self._require_enough(received)
        messages = getattr(self, f"_close_{self.phase}")(received)
        self._allowed, self._received = set(messages), {}
        self._phase += 1
        return messages

    def _require_enough(self, left):
        if len(left) >= self._setup.threshold:
            return
        reasons = "".join(f"; excluded client {client} ({why})" for client, why in sorted(self.excluded.items()))
        raise ProtocolError(
            f"{self.phase}: {len(left)} of {len(self._allowed)} clients are left, "
            f"the threshold is {self._setup.threshold}{reasons}"
        )

    def _take_advertise_keys(self, sender, message):
        keys, signature = message[: 2 * crypto.KEY_BYTES], message[2 * crypto.KEY_BYTES :]
        if len(message) != KEYS_BYTES:
            raise ProtocolError(f"keys of {len(message)} bytes, expected {KEYS_BYTES}", sender)
        verify_by(self._setup, sender, signature, advertised(self._setup, sender, keys))
        pair = {keys[: crypto.KEY_BYTES], keys[crypto.KEY_BYTES :]}
        for key in pair:
            crypto.check_public_key(key, sender)
        # The clients would refuse the whole session for these: better without the one client.
        if len(pair) < 2 or pair & self._seen_keys:
            raise ProtocolError("its public keys are not its own", sender)
        self._seen_keys |= pair
        return message

    def _close_advertise_keys(self, received):
        broadcast = pack_records(received)
        self._transcript = transcript(self._setup, broadcast)
        self._points = {client: point for point, client in enumerate(received, start=1)}
        self._mask_keys = {
            client: message[crypto.KEY_BYTES : 2 * crypto.KEY_BYTES] for client, message in received.items()
        }
        return dict.fromkeys(received, broadcast)

    def _take_share_keys(self, sender, message):
        head = COMMITMENT_BYTES + 2 * SHARE_HASH_BYTES
        if len(message) < head:
            raise ProtocolError(f"shares of {len(message)} bytes", sender)
        records = unpack_records(message[head:], RECORD_BYTES, peer=sender)
        if set(records) != self._allowed - {sender}:
            raise ProtocolError("its shares are not for exactly the other clients", sender)
        return message[:COMMITMENT_BYTES], message[COMMITMENT_BYTES:head], records

    def _close_share_keys(self, received):
        self._commitments = {client: commitment for client, (commitment, _, _) in received.items()}
        self._hashes = {
            owner: {owner: own} | {holder: record[SEALED_BYTES:] for holder, record in records.items()}
            for owner, (_, own, records) in received.items()
        }
        return {
            client: pack_records({peer: sent[client] for peer, (_, _, sent) in received.items() if peer != client})
            for client in received
        }

    def _take_check_shares(self, sender, message):
        accused = set(unpack_records(message, 0, peer=sender))
        if not accused <= self._allowed - {sender}:
            raise ProtocolError("it complains of clients whose shares it did not get", sender)
        return accused

    def _close_check_shares(self, received):
        remaining, without = _without_conflicts(received)
        self.excluded |= {client: f"check_shares: {why}" for client, why in without.items()}
        self._require_enough(remaining)
        self._commitments = {client: self._commitments[client] for client in remaining}
        return dict.fromkeys(remaining, pack_records(dict.fromkeys(remaining, b"")))

    def _take_masked_input(self, sender, message):
        self._masked_total += unpack_bits(message, self._num_values, self._setup.modulus_bits, peer=sender)

    def _close_masked_input(self, received):
        self.survivors = tuple(received)
        self._list = pack_records(dict.fromkeys(received, b""))
        return dict.fromkeys(received, self._list)

    def _take_consistency_check(self, sender, message):
        verify_by(self._setup, sender, message, agreed(self._transcript, self._list))
        return message

    def _close_consistency_check(self, received):
        return dict.fromkeys(received, pack_records(received))

    def _take_unmasking(self, sender, message):
        records = unpack_records(message, shamir.SHARE_BYTES, peer=sender)
        if set(records) != set(self._commitments):
            raise ProtocolError("its shares are not of exactly the clients that stayed", sender)
        for owner, share in records.items():
            hashes = self._hashes[owner][sender]
            of_key, of_seed = hashes[:SHARE_HASH_BYTES], hashes[SHARE_HASH_BYTES:]
            if share_hash(share) != (of_seed if owner in self.survivors else of_key):
                raise ProtocolError(f"its share of client {owner}'s secret is not the one that it accepted", sender)
        return records

    def _close_unmasking(self, received):
        chosen = list(received)[: self._setup.threshold]
        secrets = dict(
            zip(
                self._commitments,
                shamir.join(
                    [self._points[client] for client in chosen],
                    [[received[client][owner] for client in chosen] for owner in self._commitments],
                ),
            )
        )
        secrets = self._whole(secrets)
        total = self._masked_total.copy()
        for owner, secret in secrets.items():
            if owner in self.survivors:
                crypto.add_mask(total, secret, -1)
                continue
            for peer in self.survivors:
                seed = pair_seed(self._setup, secret, owner, self._mask_keys[peer], peer)
                crypto.add_mask(total, seed, -pair_sign(peer, owner))
        self.total = total & np.uint32(2**self._setup.modulus_bits - 1)
        return {}

    def _whole(self, secrets: dict[int, bytes | None]) -> dict[int, bytes]:
        """The secrets, whose shares are those that their owner dealt: whoever's do not give the secret is a liar
        itself, and ProtocolError names the first of them."""
        whole, broken = {}, []
        for owner, secret in secrets.items():
            if owner in self.survivors:
                right = secret is not None and commitment(secret) == self._commitments[owner]
            else:
                right = secret is not None and crypto.public_key(secret) == self._mask_keys[owner]
            if right:
                whole[owner] = secret
            else:
                broken.append(owner)
                self.excluded[owner] = "unmasking: the shares that it dealt do not belong together"
        if broken:
            raise ProtocolError("the shares that it dealt do not belong together", broken[0])
        return whole


def _without_conflicts(complaints: dict[int, set[int]]) -> tuple[list[int], dict[int, str]]:
    """(who stays, {who does not: why}) after each client said whose shares are bad.

    Of two who disagree one lies, and no honest two disagree. Out goes whoever disagrees with the most others, of equals
    the one accused by more, until nobody disagrees. A single liar thus goes alone if it deals bad shares to two or
    more, or accuses two or more. It can have one honest client sent away in its own place, by accusing only this one.
    """
    accusers = {client: {c for c in complaints if client in complaints[c]} for client in complaints}
    conflicts = {client: accusers[client] | (complaints[client] & set(complaints)) for client in complaints}
    without = {}
    while any(conflicts.values()):
        worst = max(conflicts, key=lambda client: (len(conflicts[client]), len(accusers[client])))
        bad, says = sorted(accusers[worst]), sorted(complaints[worst])
        without[worst] = " and ".join(
            [f"its shares are bad, say clients {bad}"] * bool(bad)
            + [f"it alone finds those of {says} bad"] * bool(says)
        )
        conflicts = {client: others - {worst} for client, others in conflicts.items() if client != worst}
    return sorted(conflicts), without
