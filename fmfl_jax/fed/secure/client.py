"""A client of secure aggregation (Bonawitz et al., CCS 2017, figure 4, with the steps against an active server).

    y_u = x_u + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv)   mod 2^m

b_u and the key behind all s_uv are secret-shared among the clients: for those whose y_u arrived the others reveal the
shares of b_u, for those who vanished before that the shares of the key, never both.

Two additions to the paper keep liars from stopping a session. Every owner commits to each share with a hash, so a wrong
share is seen on arrival. After the exchange of shares each client says whose shares are bad; the server names those who
stay, and only they mask with one another.
"""

import dataclasses
import functools
import os
from collections.abc import Callable

import numpy as np

from fmfl_jax.fed.secure import crypto, shamir
from fmfl_jax.fed.secure.wire import ProtocolError, pack_bits, pack_records, unpack_records

PHASES = ("advertise_keys", "share_keys", "check_shares", "masked_input", "consistency_check", "unmasking")
KEYS_BYTES = 2 * crypto.KEY_BYTES + crypto.SIGNATURE_BYTES
SEALED_BYTES = 2 * shamir.SHARE_BYTES + crypto.TAG_BYTES
COMMITMENT_BYTES = 32
SHARE_HASH_BYTES = 16
RECORD_BYTES = SEALED_BYTES + 2 * SHARE_HASH_BYTES  # what a client sends to another: shares sealed, their hashes open


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What everybody knows before a session. session: 16 bytes, never used before. threshold: how many clients must
    stay to the end. modulus_bits: m. verify_keys: {client: Ed25519 public key}, which the server must not choose."""

    session: bytes
    threshold: int
    modulus_bits: int
    verify_keys: dict[int, bytes]

    def __post_init__(self):
        if len(self.session) != 16:
            raise ValueError(f"session must be 16 bytes, got {len(self.session)}")
        if self.threshold < 2:
            raise ValueError(f"threshold must be >= 2: a sum of one is no secret; got {self.threshold}")
        if not 1 <= self.modulus_bits <= 32:
            raise ValueError(f"modulus_bits must be in 1..32, got {self.modulus_bits}")
        if any(not 0 <= client < 2**32 for client in self.verify_keys):
            raise ValueError("clients' numbers must fit in 32 bits")


def _phase(method):
    """Each phase once and in order, none after an error: two answers to two lists would tell both shares of a peer."""

    @functools.wraps(method)
    def guarded(self, *arguments):
        if method.__name__ != self._next_phase:
            self._next_phase = None
            self._refuse(f"it is not the time for {method.__name__}")
        self._next_phase = None
        answer = method(self, *arguments)
        self._next_phase = dict(zip(PHASES, PHASES[1:])).get(method.__name__)
        return answer

    return guarded


class Client:
    """One client in one session. Its methods are the phases: each is called once, in the order of PHASES, with what
    the server sent, and returns the bytes for the server. All raise ProtocolError when the server broke the protocol or
    too few are left, naming a peer only for what this peer has signed; a client that raised reveals nothing further.
    Bad shares of a peer raise nothing: `check_shares` reports them.

    The sum stays secret from the server and any k clients together if 2 threshold > num_clients + k. Clients refuse a
    threshold that is no majority of the cohort, as the server could then unmask two halves in two ways. What no client
    can prevent: one that encodes nonsense into its own vector.
    """

    def __init__(
        self, client_id: int, signing_key: bytes, setup: Setup, *, random: Callable[[int], bytes] = os.urandom
    ):
        self.client_id = client_id
        self._signing_key, self._setup, self._random = signing_key, setup, random
        self._next_phase = PHASES[0]
        self._seal_private, self._mask_private, self._self_seed = (random(32) for _ in range(3))

    @_phase
    def advertise_keys(self) -> bytes:
        """Two public keys (for sealing, for masks), signed."""
        self._own_keys = crypto.public_key(self._seal_private) + crypto.public_key(self._mask_private)
        return self._own_keys + crypto.sign(self._signing_key, advertised(self._setup, self.client_id, self._own_keys))

    @_phase
    def share_keys(self, broadcast: bytes) -> bytes:
        """broadcast: all clients' keys. Returns a commitment to b_u, hashes of the pair of shares that I keep, and for
        every other client a sealed pair and its hashes."""
        setup, me = self._setup, self.client_id
        records = unpack_records(broadcast, KEYS_BYTES)
        self._require_enough(records, "advertised keys")
        if 2 * setup.threshold <= len(records):
            self._refuse(f"a threshold of {setup.threshold} is no majority of {len(records)} clients")
        if records.get(me, b"")[: len(self._own_keys)] != self._own_keys:
            self._refuse("the server does not list my own keys")
        keys = {}
        for peer, record in records.items():
            both, signature = record[: 2 * crypto.KEY_BYTES], record[2 * crypto.KEY_BYTES :]
            self._require_signed(peer, signature, advertised(setup, peer, both), "keys")
            keys[peer] = both[: crypto.KEY_BYTES], both[crypto.KEY_BYTES :]
        if len({key for pair in keys.values() for key in pair}) < 2 * len(keys):
            self._refuse("two public keys are the same")
        self._mask_keys = {peer: mask_key for peer, (_, mask_key) in keys.items()}
        self._seal_keys = {peer: seal_key for peer, (seal_key, _) in keys.items()}
        self._transcript = transcript(setup, broadcast)
        of_key, of_seed = (
            dict(zip(keys, shamir.split(secret, setup.threshold, len(keys), self._random)))
            for secret in (self._mask_private, self._self_seed)
        )
        self._held = {me: (of_key[me], of_seed[me])}
        records = {
            peer: crypto.seal(self._channel(me, peer), of_key[peer] + of_seed[peer], self._transcript)
            + share_hash(of_key[peer])
            + share_hash(of_seed[peer])
            for peer in keys
            if peer != me
        }
        own = commitment(self._self_seed) + share_hash(of_key[me]) + share_hash(of_seed[me])
        return own + pack_records(records)

    @_phase
    def check_shares(self, delivered: bytes) -> bytes:
        """delivered: the others' sealed shares for me. Returns the list of those whose shares cannot be opened or are
        not what they committed to."""
        bad = []
        for peer, record in unpack_records(delivered, RECORD_BYTES).items():
            if peer == self.client_id or peer not in self._mask_keys:
                self._refuse(f"the server delivers shares of client {peer}, who advertised no keys")
            try:
                pair = crypto.unseal(self._channel(peer, self.client_id), record[:SEALED_BYTES], self._transcript, peer)
            except ProtocolError:
                bad.append(peer)
                continue
            of_key, of_seed = pair[: shamir.SHARE_BYTES], pair[shamir.SHARE_BYTES :]
            if share_hash(of_key) + share_hash(of_seed) != record[SEALED_BYTES:]:
                bad.append(peer)
                continue
            self._held[peer] = of_key, of_seed
        return pack_records(dict.fromkeys(bad, b""))

    @_phase
    def masked_input(self, remaining: bytes, vector: np.ndarray) -> bytes:
        """remaining: who goes on after the check of shares, as the server says. vector: uint32 [n] below 2^m. Returns
        it masked and packed."""
        peers = set(unpack_records(remaining, 0))
        self._require_enough(peers, "shared keys")
        if self.client_id not in peers:
            self._refuse("the server goes on without me")
        if not peers <= set(self._held):
            self._refuse(f"no shares are held of {sorted(peers - set(self._held))}")
        self._held = {peer: pair for peer, pair in self._held.items() if peer in peers}
        if vector.dtype != np.uint32 or vector.ndim != 1 or np.any(vector > np.uint32(2**self._setup.modulus_bits - 1)):
            raise ValueError(f"the vector must be uint32 [n] below 2^{self._setup.modulus_bits}")
        masked = vector.copy()
        crypto.add_mask(masked, self._self_seed, 1)
        for peer in sorted(peers - {self.client_id}):
            seed = pair_seed(self._setup, self._mask_private, self.client_id, self._mask_keys[peer], peer)
            crypto.add_mask(masked, seed, pair_sign(self.client_id, peer))
        return pack_bits(masked & np.uint32(2**self._setup.modulus_bits - 1), self._setup.modulus_bits)

    @_phase
    def consistency_check(self, survivors: bytes) -> bytes:
        """survivors: whose masked input arrived, as the server says. Returns my signature under this list."""
        self._survivors = set(unpack_records(survivors, 0))
        self._require_enough(self._survivors, "sent a masked input")
        if self.client_id not in self._survivors:
            self._refuse("the server says that my masked input is lost, and would unmask it")
        if not self._survivors <= set(self._held):
            self._refuse(f"no shares are held of {sorted(self._survivors - set(self._held))}")
        return crypto.sign(self._signing_key, agreed(self._transcript, survivors))

    @_phase
    def unmasking(self, signatures: bytes) -> bytes:
        """signatures: of at least `threshold` survivors, under the list that I signed. Returns one share per client
        that went on to mask: of b_u for a survivor, of the mask key for the others."""
        records = unpack_records(signatures, crypto.SIGNATURE_BYTES)
        self._require_enough(records, "signed the list of survivors")
        message = agreed(self._transcript, pack_records(dict.fromkeys(self._survivors, b"")))
        for peer, signature in records.items():
            if peer not in self._survivors:
                self._refuse(f"the server lists a signature of client {peer}, who is no survivor")
            self._require_signed(peer, signature, message, "a list of survivors")
        return pack_records(
            {peer: of_seed if peer in self._survivors else of_key for peer, (of_key, of_seed) in self._held.items()}
        )

    def _refuse(self, reason: str):
        raise ProtocolError(f"client {self.client_id} refuses: {reason}")

    def _require_enough(self, peers, what: str):
        if len(peers) < self._setup.threshold:
            self._refuse(f"only {len(peers)} {what}, the threshold is {self._setup.threshold}")

    def _require_signed(self, peer: int, signature: bytes, message: bytes, what: str):
        """The server checked what the peer sent: if this signature is wrong, the server or the network changed it."""
        try:
            verify_by(self._setup, peer, signature, message)
        except ProtocolError:
            self._refuse(f"the server passes on {what} with a signature that is not client {peer}'s")

    def _channel(self, sender: int, receiver: int) -> bytes:
        """The key that seals what goes from the sender to the receiver, of whom I am one."""
        peer = receiver if sender == self.client_id else sender
        info = b"seal" + self._setup.session + _ids(sender, receiver)
        return crypto.agree(self._seal_private, self._seal_keys[peer], info, peer)


def pair_seed(setup: Setup, private: bytes, owner: int, public: bytes, peer: int) -> bytes:
    """The seed of the mask between two clients, from the mask key of one and the public one of the other."""
    return crypto.agree(private, public, b"mask" + setup.session + _ids(*sorted((owner, peer))), peer)


def pair_sign(owner: int, peer: int) -> int:
    """Of two clients one adds the mask and the other takes it away."""
    return 1 if owner < peer else -1


def commitment(self_seed: bytes) -> bytes:
    """Lets the server see that b_u was put together right. Not in the paper; of 256 random bits it tells nothing."""
    return crypto.digest(b"self mask", self_seed)


def share_hash(share: bytes) -> bytes:
    """An owner's commitment to one share, which shows a wrong one when it is revealed. Not in the paper; of 279 random
    bits it tells nothing."""
    return crypto.digest(b"share", share)[:SHARE_HASH_BYTES]


def transcript(setup: Setup, broadcast: bytes) -> bytes:
    """32 bytes that fix who takes part with which keys. Bound into all that follows, they make replays useless: each
    client's keys in them are fresh."""
    return crypto.digest(setup.session, _ids(setup.threshold, setup.modulus_bits), broadcast)


def advertised(setup: Setup, client_id: int, keys: bytes) -> bytes:
    """What a client signs of its public keys."""
    return b"keys" + setup.session + _ids(client_id) + keys


def agreed(transcript: bytes, survivors: bytes) -> bytes:
    """What a client signs of the list of survivors."""
    return b"survivors" + transcript + survivors


def verify_by(setup: Setup, peer: int, signature: bytes, message: bytes):
    """ProtocolError about the peer unless it is known and has signed the message."""
    if peer not in setup.verify_keys:
        raise ProtocolError("unknown: there is no verify key for it", peer)
    crypto.verify(setup.verify_keys[peer], signature, message, peer)


def _ids(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(4, "little") for number in numbers)
