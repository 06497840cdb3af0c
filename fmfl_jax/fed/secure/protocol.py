"""All of secure aggregation (Bonawitz et al., CCS 2017) in one process, with the bytes that it sends."""

import os
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np

from fmfl_jax.fed.secure import crypto
from fmfl_jax.fed.secure.client import PHASES, Client, Setup
from fmfl_jax.fed.secure.server import Server


class ProtocolResult(NamedTuple):
    """total: uint32 [n], the sum of the survivors' vectors modulo 2^m. survivors: whose masked input arrived.
    bytes_up, bytes_down: {phase: {client: bytes}}, what each client sent in the phase and got after it, without the
    transport's own. seconds: all clients one after the other, and the server; server_seconds: the server alone."""

    total: np.ndarray
    survivors: tuple[int, ...]
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
) -> ProtocolResult:
    """One session with fresh identities. vectors: {client: uint32 [n] below 2^modulus_bits}, all of one n.

    drop_before_masking: clients that vanish after they shared their keys; they are not in the sum. drop_after_masking:
    those that vanish once their masked input has arrived; they are. random(n) -> n bytes.

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
    setup = Setup(
        session=random(16),
        threshold=threshold,
        modulus_bits=modulus_bits,
        verify_keys={client: crypto.verify_key(key) for client, key in signing_keys.items()},
    )
    clients = {client: Client(client, key, setup, random=random) for client, key in signing_keys.items()}
    server = Server(setup, *sizes.pop())
    bytes_up, bytes_down, server_seconds = {}, {}, 0.0
    inbox = dict.fromkeys(clients)
    for phase in PHASES:
        inbox = {client: message for client, message in inbox.items() if client not in _gone(phase, early, late)}
        bytes_up[phase] = {}
        for client, message in inbox.items():
            arguments = [] if phase == "advertise_keys" else [message]
            arguments += [vectors[client]] if phase == "masked_input" else []
            answer = getattr(clients[client], phase)(*arguments)
            bytes_up[phase][client] = len(answer)
            server_seconds -= time.perf_counter()
            server.receive(client, answer)
            server_seconds += time.perf_counter()
        server_seconds -= time.perf_counter()
        inbox = server.close()
        server_seconds += time.perf_counter()
        bytes_down[phase] = {client: len(message) for client, message in inbox.items()}
    return ProtocolResult(
        server.total, server.survivors, bytes_up, bytes_down, time.perf_counter() - started, server_seconds
    )


def _gone(phase: str, early: set[int], late: set[int]) -> set[int]:
    """Who is not there any more in a phase."""
    index = PHASES.index(phase)
    return (early if index >= PHASES.index("masked_input") else set()) | (
        late if index >= PHASES.index("consistency_check") else set()
    )
