"""All of secure aggregation (Bonawitz et al., CCS 2017) in one process, with the bytes that it sends."""

import contextlib
import dataclasses
import os
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np

from fmfl_jax.fed.secure import crypto
from fmfl_jax.fed.secure.client import PHASES, Client, Setup
from fmfl_jax.fed.secure.server import Server
from fmfl_jax.fed.secure.wire import ProtocolError


class ProtocolResult(NamedTuple):
    """total: uint32 [n], the sum of the survivors' vectors modulo 2^m. survivors: whose masked input arrived. excluded:
    {client: why} of those who broke the protocol. bytes_up, bytes_down: {phase: {client: bytes}}, what each client sent
    in the phase and got after it, over all sessions, without the transport's own. seconds: all clients one after the
    other, and the server; server_seconds: the server alone."""

    total: np.ndarray
    survivors: tuple[int, ...]
    excluded: dict[int, str]
    bytes_up: dict[str, dict[int, int]]
    bytes_down: dict[str, dict[int, int]]
    seconds: float
    server_seconds: float


def run_protocol(
    vectors: dict[int, np.ndarray],
    *,
    threshold: int,
    modulus_bits: int,
    drop_before_masking: Collection[int] = (),
    drop_after_masking: Collection[int] = (),
    random: Callable[[int], bytes] = os.urandom,
    make_client: Callable[..., Client] = Client,
) -> ProtocolResult:
    """The protocol with fresh identities. vectors: {client: uint32 [n] below 2^modulus_bits}, all of one n.

    drop_before_masking: clients that vanish after they shared their keys; they are not in the sum. drop_after_masking:
    those that vanish once their masked input has arrived; they are. random(n) -> n bytes. make_client: with Client's
    arguments; a client of its own may lie.

    A client whose message the server refuses is left out from then on. If an owner's shares turn out not to belong
    together, which only the end shows, a new session runs without it, among those who were there to the end. Sums of
    two sessions over different clients would tell their difference, but the first one's stays hidden from everybody who
    does not know the owner's own mask: a server in league with that owner is the case that this does not cover.

    Raises ValueError for arguments that do not fit together, ProtocolError when fewer than `threshold` are left.
    """
    early, late = set(drop_before_masking), set(drop_after_masking)
    if not early | late <= set(vectors) or early & late:
        raise ValueError("who drops out must be among the clients, and drop out once")
    sizes = {vector.shape for vector in vectors.values()}
    if len(sizes) != 1:
        raise ValueError(f"the vectors' shapes differ: {sorted(sizes)}")
    started = time.perf_counter()
    signing_keys = {client: random(32) for client in vectors}
    verify_keys = {client: crypto.verify_key(key) for client, key in signing_keys.items()}
    traffic = _Traffic({phase: Counter() for phase in PHASES}, {phase: Counter() for phase in PHASES})
    excluded, remaining = {}, set(vectors)
    while True:
        setup = Setup(
            session=random(16),
            threshold=threshold,
            modulus_bits=modulus_bits,
            verify_keys={client: key for client, key in verify_keys.items() if client in remaining},
        )
        clients = {c: make_client(c, signing_keys[c], setup, random=random) for c in setup.verify_keys}
        server = Server(setup, *next(iter(sizes)))
        server.excluded |= excluded
        try:
            _run_session(server, clients, vectors, (early, late), traffic)
            break
        except ProtocolError as error:
            if error.peer not in server.excluded:
                raise
            excluded, remaining = server.excluded, set(vectors) - early - late - set(server.excluded)
    assert server.total is not None  # after a whole session
    return ProtocolResult(
        server.total,
        server.survivors,
        server.excluded,
        _counted(traffic.up),
        _counted(traffic.down),
        time.perf_counter() - started,
        traffic.server_seconds,
    )


def _counted(way: dict[str, Counter]) -> dict[str, dict[int, int]]:
    return {phase: dict(sizes) for phase, sizes in way.items()}


@dataclasses.dataclass
class _Traffic:
    """What is counted over all sessions; see ProtocolResult."""

    up: dict[str, Counter]
    down: dict[str, Counter]
    server_seconds: float = 0.0


def _run_session(server: Server, clients: dict[int, Client], vectors, dropouts, traffic: _Traffic):
    """All phases; the server has the sum then. Raises ProtocolError as its `close` does."""
    inbox = dict.fromkeys(clients)
    for phase in PHASES:
        inbox = {client: message for client, message in inbox.items() if client not in _gone(phase, *dropouts)}
        for client, message in inbox.items():
            arguments = [] if phase == "advertise_keys" else [message]
            arguments += [vectors[client]] if phase == "masked_input" else []
            answer = getattr(clients[client], phase)(*arguments)
            traffic.up[phase][client] += len(answer)
            traffic.server_seconds -= time.perf_counter()
            with contextlib.suppress(ProtocolError):  # the server noted whom it excluded, and goes on
                server.receive(client, answer)
            traffic.server_seconds += time.perf_counter()
        traffic.server_seconds -= time.perf_counter()
        inbox = server.close()
        traffic.server_seconds += time.perf_counter()
        traffic.down[phase].update({client: len(message) for client, message in inbox.items()})


def _gone(phase: str, early: set[int], late: set[int]) -> set[int]:
    """Who is not there any more in a phase."""
    index = PHASES.index(phase)
    return (early if index >= PHASES.index("masked_input") else set()) | (
        late if index >= PHASES.index("consistency_check") else set()
    )
