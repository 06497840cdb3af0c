"""Envelopes in Flower's records (flwr 1.42, Message API): the head as one JSON string, blobs as arrays.

Arrays, because Flower cuts those into chunks and nothing else; of bytes as they are, because Flower's own serialization
of a NumPy array copies all of it twice at each end. No Strategy of Flower's is used: what it would decide, run_rounds
does. Only this module and secagg_plus*.py import flwr.
"""

import json
import time

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict  # pyright: ignore[reportMissingImports]
from flwr.serverapp import Grid  # pyright: ignore[reportMissingImports]

from fmfl_jax.deploy.envelope import Envelope

_POLL_S = 0.1


def to_records(envelope: Envelope) -> RecordDict:
    """The content of a message."""
    arrays = {name: Array("uint8", (len(blob),), "bytes", blob) for name, blob in envelope.blobs.items()}
    return RecordDict({"head": ConfigRecord({"json": json.dumps(envelope.head)}), "blobs": ArrayRecord(arrays)})


def from_records(content: RecordDict) -> Envelope:
    """What a message holds. Raises ValueError for a message of another kind."""
    try:
        head = json.loads(content.config_records["head"]["json"])
        blobs = {name: array.data for name, array in content.array_records["blobs"].items()}
    except (KeyError, TypeError) as error:
        raise ValueError(f"the message holds no envelope: {error!r}") from None
    if not isinstance(head, dict):
        raise ValueError("the message holds no envelope: its head is no dictionary")
    return Envelope(head, blobs)


def _read(content: RecordDict) -> Envelope:
    """As `from_records`, but {"error": why} of what is no envelope: one node's nonsense is no error of the round."""
    try:
        return from_records(content)
    except ValueError as error:
        return Envelope({"error": str(error)})


class GridLink:
    """A fleet's link over a ServerApp's grid."""

    def __init__(self, grid: Grid):
        self._grid = grid

    def nodes(self) -> list[int]:
        return list(self._grid.get_node_ids())

    def exchange(self, requests: dict[int, Envelope], timeout_s: float) -> dict[int, Envelope]:
        contents = {node: to_records(envelope) for node, envelope in requests.items()}
        return {node: _read(reply.content) for node, reply in self.replies(contents, timeout_s).items()}

    def replies(self, contents: dict[int, RecordDict], timeout_s: float) -> dict[int, Message]:
        """The replies by node, without Flower's own errors: then a node is not there. Flower's send_and_receive looks
        every 3 s; this looks every tenth. A message that came too late is not delivered any more (its time to live)."""
        messages = [
            Message(content, dst_node_id=node, message_type=MessageType.TRAIN, ttl=timeout_s)
            for node, content in contents.items()
        ]
        waiting = dict(zip(self._grid.push_messages(messages), contents))
        found, until = {}, time.monotonic() + timeout_s
        while waiting and time.monotonic() < until:
            for reply in self._grid.pull_messages(list(waiting)):
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is not None and not reply.has_error():
                    found[node] = reply
            time.sleep(_POLL_S)
        return found
