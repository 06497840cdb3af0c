"""Flower's own secure aggregation, SecAgg+ (Bell et al., CCS 2020), in place of this project's protocol: the server.

Flower's workflow and its mod of the ClientApp (flwr 1.42) are the protocol, four exchanges of which the third trains.
Here is what goes in and comes out; secagg_plus_client.py is the other half. The participants are nodes, each with the
weighted mean x_n of its own clients' updates:

    y_n = quantize(w_n / w_max x_n) + PRG(b_n) + sum_m +-PRG(s_nm)   mod 2^32,   update = sum_n w_n x_n / sum_n w_n

What it leaves open to the server stands in docs/results/flower.md.
"""

import json
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict  # pyright: ignore[reportMissingImports]
from flwr.common import FitIns, FitRes, Parameters, parameters_to_ndarrays  # pyright: ignore[reportMissingImports]
from flwr.common.serde import recorddict_to_proto  # pyright: ignore[reportMissingImports]
from flwr.server import LegacyContext  # pyright: ignore[reportMissingImports]
from flwr.server.workflow import SecAggPlusWorkflow  # pyright: ignore[reportMissingImports]
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key  # pyright: ignore[reportMissingImports]

from fmfl_jax.deploy.envelope import Envelope
from fmfl_jax.deploy.fleet import Fleet, clients_of
from fmfl_jax.deploy.flower import GridLink
from fmfl_jax.deploy.secure import SecureProtocol, SecureResult
from fmfl_jax.experiment.build.privacy import quorum
from fmfl_jax.fed.core.types import SecureSum, Tree

_MODULUS_BITS = 32


def secagg_plus(link: GridLink, *, clip: float, bits: int) -> SecureProtocol:
    """The protocol over a fleet's link. clip: w_n / w_max x_n saturates beyond it. bits: of a quantized value, fewer
    where the sum over the nodes would not fit. Its result is the mean update itself, float32 [n]."""

    def run(
        fleet: Fleet,
        head: dict,
        members: dict[int, dict],
        blobs: dict[str, bytes],
        *,
        secure_sum: SecureSum,
        num_values: int,
    ) -> SecureResult:
        del secure_sum
        requests, silent = fleet.requests(head, members, blobs)
        grid, strategy = _Grid(link, fleet.timeout_s, set(requests)), _Strategy(requests)
        failure = _run_workflow(grid, strategy, members, clip, bits)
        mean = None if failure else strategy.mean(num_values)
        if mean is None and failure is None:
            failure = f"SecAgg+ failed: the mean is not {num_values} finite numbers"
        silent += fleet.missing(requests, grid.answered)
        fields = {} if failure else strategy.fields()
        dropped = {client: said["error"] for client, said in fields.items() if "error" in said}
        counted = tuple(sorted(fields.keys() - dropped.keys()))
        silent = sorted(set(silent) - set(counted))
        return SecureResult(mean, failure, counted, dropped, silent, grid.sent_bytes, grid.received_bytes)

    return SecureProtocol(run, _of_mean)


def _of_mean(secure_sum: SecureSum) -> SecureSum:
    """What comes back is the mean update, its values leaf after leaf."""

    def decode(mean: jax.Array, template: Tree) -> Tree:
        leaves, structure = jax.tree.flatten(template)
        ends = np.cumsum([math.prod(leaf.shape) for leaf in leaves])
        parts = [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(jnp.split(mean, ends[:-1]), leaves)]
        return jax.tree.unflatten(structure, parts)

    return secure_sum._replace(
        decode=decode, num_values=lambda template: sum(math.prod(x.shape) for x in jax.tree.leaves(template))
    )


def _run_workflow(grid: "_Grid", strategy: "_Strategy", members: dict[int, dict], clip: float, bits: int) -> str | None:
    """Why there is no sum; None where there is."""
    requests = strategy.requests
    num_nodes = len(requests)
    if num_nodes < 2:
        return f"SecAgg+ needs two nodes: {num_nodes} of this round's clients' are here"
    weights = [sum(members[client]["weight"] for client in clients_of(request)) for request in requests.values()]
    # One bit less than would fit: Flower rounds up to 2^bits itself, not to 2^bits - 1.
    bits = min(bits, _MODULUS_BITS - 1 - (num_nodes - 1).bit_length())
    threshold = quorum(num_nodes)
    workflow = SecAggPlusWorkflow(
        num_shares=1.0,  # of all nodes: everybody is everybody's neighbour
        reconstruction_threshold=threshold / num_nodes,
        max_weight=max(weights),
        clipping_range=float(clip),
        quantization_range=2**bits,
        modulus_range=2**_MODULUS_BITS,
        timeout=grid.timeout_s,
    )
    state = RecordDict({MAIN_CONFIGS_RECORD: ConfigRecord({Key.CURRENT_ROUND: 1}), MAIN_PARAMS_RECORD: ArrayRecord()})
    context = Context(run_id=0, node_id=0, node_config={}, state=state, run_config={})
    try:
        workflow(grid, LegacyContext(context, strategy=strategy))
    except (ValueError, KeyError) as error:  # a node's answer that is none of the protocol's
        return f"SecAgg+ failed: {type(error).__name__} {error}"
    if not strategy.results:
        return f"SecAgg+ stopped: fewer than {threshold} of {num_nodes} nodes stayed, or one left before its third step"
    return None


class _Grid:
    """What the workflow sends by. answered: the nodes that are still there. Bytes of all records."""

    def __init__(self, link: GridLink, timeout_s: float, nodes: set[int]):
        self._link, self.timeout_s, self.answered = link, timeout_s, nodes
        self.sent_bytes = self.received_bytes = 0

    def send_and_receive(self, messages: list[Message], *, timeout: float) -> list[Message]:
        replies = self._link.replies({message.metadata.dst_node_id: message.content for message in messages}, timeout)
        self.sent_bytes += sum(_num_bytes(message.content) for message in messages)
        self.received_bytes += sum(_num_bytes(reply.content) for reply in replies.values())
        self.answered = set(replies) or self.answered  # where nobody answers, all refused, and none of them has left
        return list(replies.values())


class _Proxy(NamedTuple):
    node_id: int


class _Strategy:
    """requests: by node, handed out in Flower's older records. results: what came back by node, once unmasked; the
    workflow has put the mean in the place of each node's parameters."""

    def __init__(self, requests: dict[int, Envelope]):
        self.requests = requests
        self.results: dict[int, FitRes] = {}

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: Any):
        del server_round, parameters, client_manager
        return [(_Proxy(node), _instructions(request)) for node, request in self.requests.items()]

    def aggregate_fit(self, server_round: int, results: list, failures: list):
        del server_round, failures
        self.results = {proxy.node_id: result for proxy, result in results}
        return None, {}

    def fields(self) -> dict[int, dict]:
        """{client: what its node says of it}, of the clients that were asked for."""
        found = {}
        for node, result in self.results.items():
            said = json.loads(str(result.metrics["clients"]))
            found |= {client: said.get(str(client), {}) for client in clients_of(self.requests[node])}
        return found

    def mean(self, num_values: int) -> np.ndarray | None:
        """float32 [n]; None where all weighed nothing, or a node's vector had another length."""
        (vector,) = parameters_to_ndarrays(next(iter(self.results.values())).parameters)
        return vector.astype(np.float32) if vector.shape == (num_values,) and np.all(np.isfinite(vector)) else None


def _instructions(request: Envelope) -> FitIns:
    head = json.dumps(request.head | {"blobs": list(request.blobs)})
    return FitIns(Parameters(list(request.blobs.values()), "bytes"), {"json": head})


def _num_bytes(content: RecordDict) -> int:
    """As one message; count_bytes of Flower's records fails for empty texts and lists."""
    return recorddict_to_proto(content).ByteSize()
