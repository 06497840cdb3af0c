"""A container over HTTP: one file, asked for by ranges of bytes (RFC 9110, section 14), with Python's own http.

The container's manifest is signed and its chunks are hashed, so the connection has not to be trusted.
"""

import contextlib
import http.client
import http.server
import re
import time
import urllib.parse
from collections.abc import Callable, Generator
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fmfl_jax.transport.weights.container import Base, Container, DamagedChunkError
from fmfl_jax.transport.weights.manifest import PREFIX_BYTES, Manifest, head_bytes, opened
from fmfl_jax.transport.weights.receive import OnPart, Receiver

_PIECE = 2**16
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


def make_server(
    container: Container,
    host: str,
    port: int,
    *,
    rate_bps: float | None = None,
    on_request: Callable[[int], None] | None = None,
):
    """A server of the container at /, to be started with serve_forever(). port 0: any that is free (server_port).

    rate_bps: sends no faster to each client, to see what a slow link does. on_request: told the first byte of every
    range that is asked for.
    """
    size = container.path.stat().st_size

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60  # seconds that a client may stay silent

        def do_GET(self):
            asked = _RANGE.fullmatch(self.headers.get("Range", ""))
            begin, end = (int(asked[1]), int(asked[2]) + 1) if asked else (0, size)
            if self.path != "/":
                self.send_error(404)
            elif begin >= size or begin >= end:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                end = min(end, size)
                if on_request is not None:
                    on_request(begin)
                self.send_response(206 if asked else 200)
                if asked:
                    self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Type", "application/octet-stream")
                self.send_header("Content-Length", str(end - begin))
                self.end_headers()
                self._send(begin, end)

        def _send(self, begin, end):
            started = time.monotonic()
            with container.path.open("rb") as file:
                file.seek(begin)
                for at in range(begin, end, _PIECE):
                    self.wfile.write(file.read(min(_PIECE, end - at)))
                    if rate_bps is not None:
                        time.sleep(max(0.0, 8 * (at + _PIECE - begin) / rate_bps - (time.monotonic() - started)))

        def log_message(self, format, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address):
            """A client that goes away in the middle is no event."""

    return Server((host, port), Handler)


class Fetched(NamedTuple):
    """manifest; received_bytes: of chunks, over the connection in this call; resumed_bytes: from earlier ones."""

    manifest: Manifest
    received_bytes: int
    resumed_bytes: int


def fetch(
    url: str,
    key: Ed25519PublicKey,
    folder,
    *,
    base: Base | None = None,
    on_part: OnPart | None = None,
    attempts: int = 5,
    timeout_s: float = 30.0,
) -> Fetched:
    """Receives the container at `url` into `folder` (receive.py), going on where an earlier call stopped.

    attempts: connections in a row without any progress, or damaged chunks, before it gives up.

    Raises:
      DamagedChunkError: chunks arrived damaged; those that were verified stay.
      ValueError: not a container of the key's owner, a delta for another base, a server that sends something else.
      ConnectionError: the server cannot be reached, or stays silent.
    """
    link, patience = _Link(url, timeout_s), _Patience(url, attempts)
    head = _head(link, patience)
    receiver = Receiver(head, key, folder, base=base, on_part=on_part)
    received, total, damaged = 0, len(head) + receiver.manifest.coded_bytes, 0
    try:
        while wanted := receiver.wanted():
            begin, end = wanted[0]
            before = received
            try:
                with contextlib.closing(link.pieces(len(head) + begin, len(head) + end, total)) as pieces:
                    for piece in pieces:
                        received += len(piece)
                        receiver.write(begin, piece)
                        begin += len(piece)
            except DamagedChunkError:
                damaged += 1
                if damaged >= attempts:
                    raise
            except (OSError, http.client.HTTPException) as error:
                patience.tries = 0 if received > before else patience.tries
                patience.again(error)
        receiver.finish()
    finally:
        receiver.close()
    return Fetched(receiver.manifest, received, receiver.resumed_bytes)


def fetch_manifest(url: str, key: Ed25519PublicKey, *, attempts: int = 5, timeout_s: float = 30.0) -> Manifest:
    """The manifest alone of the container at `url`. Raises ValueError, ConnectionError as `fetch`."""
    return opened(_head(_Link(url, timeout_s), _Patience(url, attempts)), key)


class _Patience:
    """Failures in a row. Raises ConnectionError at the last that is borne."""

    def __init__(self, url: str, attempts: int):
        self._url, self._attempts, self.tries = url, attempts, 0

    def again(self, error: Exception) -> None:
        """Waits for the next attempt, the longer the more have failed."""
        self.tries += 1
        if self.tries >= self._attempts:
            raise ConnectionError(f"{self._url}: {error or type(error).__name__} ({self.tries} attempts)") from error
        time.sleep(0.1 * 2**self.tries)


def _head(link, patience: _Patience) -> bytes:
    while True:
        try:
            prefix = b"".join(link.pieces(0, PREFIX_BYTES))
            return prefix + b"".join(link.pieces(PREFIX_BYTES, head_bytes(prefix)))
        except (OSError, http.client.HTTPException) as error:
            patience.again(error)


class _Link:
    def __init__(self, url: str, timeout_s: float):
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname
        if parts.scheme not in ("http", "https") or host is None:
            raise ValueError(f"url={url}: expected http://HOST:PORT/")
        self.url, self._path, self._timeout_s = url, parts.path or "/", timeout_s
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connect = lambda: kind(host, parts.port, timeout=timeout_s)

    def pieces(self, begin: int, end: int, total: int | None = None) -> Generator[bytes]:
        """The bytes [begin, end) of the file of `total` bytes. ValueError for an answer that is something else."""
        connection = self._connect()
        try:
            connection.request("GET", self._path, headers={"Range": f"bytes={begin}-{end - 1}"})
            response = connection.getresponse()
            if response.status >= 500:
                raise http.client.HTTPException(f"status {response.status}")
            if response.status != 206:
                raise ValueError(f"{self.url} answers {response.status} where a range of bytes was asked for")
            found = response.getheader("Content-Range", "")
            expected = f"bytes {begin}-{end - 1}/{'' if total is None else total}"
            if found != expected if total is not None else not found.startswith(expected):
                raise ValueError(f"{self.url} sends {found!r}, asked for {expected!r}: another file, or too long")
            at = begin
            while at < end:
                piece = response.read1(min(_PIECE, end - at))
                if not piece:
                    raise ConnectionError(f"the connection ended after {at - begin} of {end - begin} bytes")
                at += len(piece)
                yield piece
            if response.read1(1):
                raise ValueError(f"{self.url} sends more than the {end - begin} bytes asked for")
        finally:
            connection.close()
