"""Flower's own secure aggregation, SecAgg+: the ClientApp's half (secagg_plus.py is the server's).

Flower's mod answers the protocol's messages; when it wants the update, the node trains. What goes to the server is
masked: the node's mean is answered to nobody else (launch/flower_app/fmfl_client.py passes no other request for it on).
"""

import json
from collections.abc import Callable

import numpy as np
from flwr.app import Context, Message  # pyright: ignore[reportMissingImports]
from flwr.client.mod import secaggplus_mod  # pyright: ignore[reportMissingImports]
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters  # pyright: ignore[reportMissingImports]
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS  # pyright: ignore[reportMissingImports]
from flwr.compat.common import recorddict_compat  # pyright: ignore[reportMissingImports]

from fmfl_jax.deploy.envelope import Envelope


def is_secagg_plus(message: Message) -> bool:
    """Whether a message belongs to the protocol."""
    return RECORD_KEY_CONFIGS in message.content.config_records


def answer(message: Message, context: Context, ask_node: Callable[[Envelope], Envelope]) -> Message:
    """The reply to a message of the protocol. Raises ValueError where the node refuses, or what the mod raises."""

    def train(message: Message, context: Context) -> Message:
        del context
        asked = recorddict_compat.recorddict_to_fitins(message.content, keep_input=True)
        head = json.loads(str(asked.config["json"]))
        blobs = dict(zip(head.pop("blobs"), asked.parameters.tensors, strict=True))
        found = ask_node(Envelope(head | {"kind": "mean"}, blobs))
        if "error" in found.head:
            raise ValueError(found.head["error"])
        mean = np.frombuffer(found.blobs["mean"], np.float64)
        clients = {"clients": json.dumps(found.head["clients"])}
        result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([mean]), found.head["weight"], clients)
        return Message(recorddict_compat.fitres_to_recorddict(result, keep_input=True), reply_to=message)

    return secaggplus_mod(message, context, train)
