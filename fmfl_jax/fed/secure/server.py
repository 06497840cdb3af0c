"""The server of secure aggregation (Bonawitz et al., CCS 2017, figure 4): it passes messages on and learns the sum.

    sum_{u in U3} x_u = sum_{u in U3} (y_u - PRG(b_u)) + sum_{u in U2 - U3, v in U3} +-PRG(s_uv)   mod 2^m

U1, U2, U3, U4: those who advertised keys, shared them, sent a masked input, signed the list of U3.
"""

import numpy as np

from fmfl_jax.fed.secure import crypto, shamir
from fmfl_jax.fed.secure.client import (
    COMMITMENT_BYTES,
    KEYS_BYTES,
    PHASES,
    SEALED_BYTES,
    Setup,
    advertised,
    agreed,
    commitment,
    pair_seed,
    pair_sign,
    transcript,
    verify_by,
)
from fmfl_jax.fed.secure.wire import ProtocolError, pack_records, unpack_bits, unpack_records


class Server:
    """One session. In every phase of PHASES: `receive` each client's message, then `close` the phase, which gives the
    messages for those who took part. Who is missing has dropped out. After the last phase `total`, uint32 [num_values],
    is the sum of the vectors of `survivors`.
    """

    def __init__(self, setup: Setup, num_values: int):
        self._setup, self._num_values = setup, num_values
        self._phase = 0
        self._allowed, self._received = set(setup.verify_keys), {}
        self._seen_keys = set()
        self._masked_total = np.zeros(num_values, np.uint32)
        self.total: np.ndarray | None = None
        self.survivors: tuple[int, ...] = ()

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
        self._received[sender] = getattr(self, f"_take_{self.phase}")(sender, message)

    def close(self) -> dict[int, bytes]:
        """Ends the phase: {client: message to it}, empty after the last. ProtocolError with fewer than `threshold`."""
        if len(self._received) < self._setup.threshold:
            raise ProtocolError(
                f"{self.phase}: {len(self._received)} of {len(self._allowed)} clients are left, "
                f"the threshold is {self._setup.threshold}"
            )
        received = dict(sorted(self._received.items()))
        messages = getattr(self, f"_close_{self.phase}")(received)
        self._allowed, self._received = set(received), {}
        self._phase += 1
        return messages

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
        records = unpack_records(message[COMMITMENT_BYTES:], SEALED_BYTES, peer=sender)
        if set(records) != self._allowed - {sender}:
            raise ProtocolError("its shares are not for exactly the other clients", sender)
        return message[:COMMITMENT_BYTES], records

    def _close_share_keys(self, received):
        self._commitments = {client: commitment for client, (commitment, _) in received.items()}
        return {
            client: pack_records({peer: sealed[client] for peer, (_, sealed) in received.items() if peer != client})
            for client in received
        }

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
            raise ProtocolError("its shares are not of exactly the clients that shared keys", sender)
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
        total = self._masked_total.copy()
        for owner, secret in secrets.items():
            if owner in self.survivors:
                if secret is None or commitment(secret) != self._commitments[owner]:
                    raise ProtocolError("the shares of its self mask do not belong together", owner)
                crypto.add_mask(total, secret, -1)
                continue
            if secret is None or crypto.public_key(secret) != self._mask_keys[owner]:
                raise ProtocolError("the shares of its mask key do not belong together", owner)
            for peer in self.survivors:
                seed = pair_seed(self._setup, secret, owner, self._mask_keys[peer], peer)
                crypto.add_mask(total, seed, -pair_sign(peer, owner))
        self.total = total & np.uint32(2**self._setup.modulus_bits - 1)
        return {}
