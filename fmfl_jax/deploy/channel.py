"""Envelopes between two processes of one machine, over a Unix socket in a folder that only the user can enter.

Flower starts a new process for every message. That process passes the message on to the node, which lives as long as
the run and keeps the weights and the compiled programs.
"""

import json
import threading
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener

from fmfl_jax.deploy.envelope import Envelope


def serve(path: str, answer: Callable[[Envelope], Envelope]) -> threading.Thread:
    """Answers requests at `path`, one after another, from a thread that ends with the process."""
    listener = Listener(path, family="AF_UNIX", backlog=16)

    def loop():
        while True:
            with listener.accept() as connection:
                try:
                    _send(connection, answer(_receive(connection)))
                except (EOFError, OSError):
                    continue  # the process that asked is gone

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    return thread


def request(path: str, envelope: Envelope) -> Envelope:
    """The answer of whoever serves at `path`. Raises OSError or EOFError where nobody does."""
    with Client(path, family="AF_UNIX") as connection:
        _send(connection, envelope)
        return _receive(connection)


def _send(connection: Connection, envelope: Envelope) -> None:
    connection.send_bytes(json.dumps([envelope.head, list(envelope.blobs)]).encode())
    for blob in envelope.blobs.values():
        connection.send_bytes(blob)


def _receive(connection: Connection) -> Envelope:
    head, names = json.loads(connection.recv_bytes())
    return Envelope(head, {name: connection.recv_bytes() for name in names})
