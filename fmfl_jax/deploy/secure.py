"""Secure aggregation between real processes: the protocol's client and server objects (fed/secure) over envelopes.

A round is one session of six exchanges; the clients train before the fourth, in which they send their masked integers.
Secrets of a session stay in the node's memory and are gone with it: a node that dies in mid-protocol has dropped out.
The keys by which clients know each other come with the node (launch/flower_keys.py), not from the server.
"""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from fmfl_jax.deploy.envelope import Envelope
from fmfl_jax.deploy.fleet import Answers, Fleet
from fmfl_jax.experiment.build.privacy import quorum
from fmfl_jax.fed.core.types import SecureSum
from fmfl_jax.fed.secure.client import PHASES, Client, Setup
from fmfl_jax.fed.secure.server import Server
from fmfl_jax.fed.secure.wire import ProtocolError

SECAGG, SECAGG_PLUS = "secagg", "secagg_plus"  # this project's protocol, and Flower's (secagg_plus.py)
TRAINS = "masked_input"  # the phase in which clients train and send


class Identities(NamedTuple):
    """verify: {client: Ed25519 public key} of all clients. signing: {client: private key} of those on this machine."""

    verify: dict[int, bytes]
    signing: dict[int, bytes]


class Sessions:
    """The clients of a node in their sessions. Only the newest session of a client lives."""

    def __init__(self, identities: Identities):
        self._identities = identities
        self._clients: dict[int, tuple[str, Client]] = {}

    def answer(self, request: Envelope, vector_of: Callable[[int], np.ndarray]) -> Envelope:
        """One phase of the clients that are asked for. vector_of(client) -> uint32 [n]: trains, and encodes. What one
        client refuses is its own error; the others answer. Raises ValueError for a request that is none of a session's.
        """
        head, fields, blobs = request.head, {}, {}
        phase = head["phase"]
        if phase not in PHASES:
            raise ValueError(f"secure aggregation has no phase {phase!r}")
        for name in head["clients"]:
            try:
                arguments = [] if phase == PHASES[0] else [request.blobs[f"to/{name}"]]
                client = self._begin(int(name), head) if phase == PHASES[0] else self._go_on(int(name), head["session"])
                arguments += [vector_of(int(name))] if phase == TRAINS else []
                blobs[name] = getattr(client, phase)(*arguments)
                fields[name] = {}
            except ProtocolError as error:
                fields[name] = {"error": str(error)}
        return Envelope({"clients": fields}, blobs)

    def _begin(self, client: int, head: dict) -> Client:
        verify, members = self._identities.verify, [int(member) for member in head["members"]]
        unknown = [member for member in members if member not in verify]
        if unknown or client not in self._identities.signing:
            raise ProtocolError(f"this node has no key of client {(unknown or [client])[0]}")
        setup = Setup(
            session=bytes.fromhex(head["session"]),
            threshold=int(head["threshold"]),
            modulus_bits=int(head["modulus_bits"]),
            verify_keys={member: verify[member] for member in members},
        )
        self._clients[client] = head["session"], Client(client, self._identities.signing[client], setup)
        return self._clients[client][1]

    def _go_on(self, client: int, session: str) -> Client:
        known, made = self._clients.get(client, (None, None))
        if known != session or made is None:
            raise ProtocolError(f"client {client} takes no part in this session: its node started anew")
        return made


class SecureResult(NamedTuple):
    """total: [n], or None where the session failed, then `failure` says why. survivors: whose update is in it. dropped:
    {client: why}. silent: clients that vanished, in any phase. Bytes of all exchanges."""

    total: np.ndarray | None
    failure: str | None
    survivors: tuple[int, ...]
    dropped: dict[int, str]
    silent: list[int]
    sent_bytes: int
    received_bytes: int


class Session(Protocol):
    """One round's session over the fleet. head, members, blobs: what training needs. num_values: n of the result."""

    def __call__(
        self,
        fleet: Fleet,
        head: dict,
        members: dict[int, dict],
        blobs: dict[str, bytes],
        *,
        secure_sum: SecureSum,
        num_values: int,
    ) -> SecureResult: ...


class SecureProtocol(NamedTuple):
    """How nodes' updates are summed unseen. secure_sum(the aggregator's) -> one whose decode takes the session's total
    and whose num_values is its length."""

    run: Session
    secure_sum: Callable[[SecureSum], SecureSum]


def secagg(verify: dict[int, bytes]) -> SecureProtocol:
    """This project's protocol. verify: the clients' public keys."""
    return SecureProtocol(functools.partial(run_session, verify=verify), lambda secure_sum: secure_sum)


def run_session(
    fleet: Fleet,
    head: dict,
    members: dict[int, dict],
    blobs: dict[str, bytes],
    *,
    secure_sum: SecureSum,
    num_values: int,
    verify: dict[int, bytes],
) -> SecureResult:
    """One session of this project's protocol; what training needs is sent in its phase alone. Its total is uint32."""
    session, threshold, modulus_bits = os.urandom(16), quorum(len(members)), secure_sum.modulus_bits
    setup = Setup(
        session=session,
        threshold=threshold,
        modulus_bits=modulus_bits,
        verify_keys={client: verify[client] for client in members},
    )
    server, failure = Server(setup, num_values), None
    inbox: dict[int, bytes] = dict.fromkeys(members, b"")
    silent, refused, sent, received = set(), {}, 0, 0
    common = {"kind": "secure", "session": session.hex(), "threshold": threshold, "modulus_bits": modulus_bits}
    for phase in PHASES:
        trains = phase == TRAINS
        asked = (head if trains else {}) | common | {"phase": phase, "members": sorted(members)}
        told = {client: members[client] if trains else {} for client in inbox}
        own = {client: {f"to/{client}": message} for client, message in inbox.items()}
        answers: Answers = fleet.ask(asked, told, blobs if trains else {}, own)
        sent, received = sent + answers.sent_bytes, received + answers.received_bytes
        silent |= set(answers.silent)
        refused |= answers.refused
        for client, message in answers.blobs.items():
            try:
                server.receive(client, message)
            except ProtocolError as error:
                refused[client] = str(error)
        try:
            inbox = server.close()
        except ProtocolError as error:
            failure = str(error)
            break
    survivors = server.survivors if failure is None else ()
    gone = sorted(silent - set(survivors))
    return SecureResult(server.total, failure, survivors, refused | server.excluded, gone, sent, received)
