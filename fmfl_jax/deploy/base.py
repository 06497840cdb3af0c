"""The base of a node: the one that lies here if it is the publisher's, else delivered (transport/weights).

What is compared here is a container's content, a hash of all bytes of the checkpoint's files. What server and node then
agree on at the hello is the fingerprint of what is trained on, so a container of another base than the server's is
refused there.
"""

import pathlib
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fmfl_jax.experiment.delivery.sources import sources
from fmfl_jax.models.formats.checkpoint import checkpoint_path
from fmfl_jax.transport.weights.container import content_of
from fmfl_jax.transport.weights.http import fetch, fetch_manifest


def delivered_base(
    url: str,
    key: Ed25519PublicKey,
    here: str | pathlib.Path | None,
    folder: pathlib.Path,
    say: Callable[[str], None],
) -> pathlib.Path:
    """The path of a checkpoint with the content of the container at `url`, of which only the manifest is fetched where
    `here` or what an earlier call left in `folder` has that content; else all of it, into `folder`. A call that was
    stopped goes on.

    Raises:
      ValueError: not a container of the key's owner, a delta, damaged chunks, another answer than ranges of bytes.
      ConnectionError: the server cannot be reached.
    """
    manifest = fetch_manifest(url, key)
    kept = folder / manifest.content[:16]  # another base in a later run gets a folder of its own
    single = next(iter(manifest.files)) if len(manifest.files) == 1 else "."
    for path in filter(None, (here, kept / single)):
        if _content(path) == manifest.content:
            say(f"the base {path} has the content {manifest.content[:16]} of {url}: nothing is fetched")
            return checkpoint_path(path)
    done = fetch(url, key, kept)
    say(f"the base was delivered: {done.received_bytes:,} bytes, content {manifest.content[:16]}, verified, in {kept}")
    return kept / single


def _content(path: str | pathlib.Path) -> str | None:
    """None where there is no checkpoint, or a damaged one."""
    try:
        return content_of(sources(checkpoint_path(path)))
    except (FileNotFoundError, ValueError):
        return None
