"""This project's secure aggregation and Flower's SecAgg+ on the same updates, in one process and without a network.

  .venv/flower/bin/python -m tools.flower_secagg NUM_VALUES NUM_PARTICIPANTS [NUM_PARTICIPANTS ...]

Prints for each: the largest error of the mean, bytes that a participant sends and gets, CPU seconds of all together.
Updates are normal of deviation .05, weights 1 to the number of participants, 24 bits, clip 1.
"""

import copy
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import Context, Message, RecordDict  # pyright: ignore[reportMissingImports]
from flwr.common.serde import recorddict_to_proto  # pyright: ignore[reportMissingImports]
from flwr.supercore.task_identity import TaskIdentity  # pyright: ignore[reportMissingImports]

from fmfl_jax.deploy import secagg_plus_client
from fmfl_jax.deploy.envelope import Envelope
from fmfl_jax.deploy.fleet import Expected, Fleet
from fmfl_jax.deploy.flower import GridLink, from_records, to_records
from fmfl_jax.deploy.secagg_plus import secagg_plus
from fmfl_jax.experiment.build.privacy import quorum
from fmfl_jax.fed.aggregators.secure import secure
from fmfl_jax.fed.secure.fixed_point import FixedPoint
from fmfl_jax.fed.secure.protocol import run_protocol

CLIP, BITS = 1.0, 24


class Cost(NamedTuple):
    """mean: float32 [n]. sent, received: bytes of a participant."""

    mean: np.ndarray
    sent: float
    received: float
    cpu_s: float


def with_secagg(updates: np.ndarray, weights: np.ndarray) -> Cost:
    """updates: float32 [K, n]. weights: float32 [K]."""
    count = len(updates)
    codec = FixedPoint(clip=CLIP, bits=BITS, max_clients=count)
    aggregator = secure(None, codec, max_weight=float(weights.max()))
    assert aggregator.secure_sum is not None
    like = jax.ShapeDtypeStruct(updates[0].shape, np.float32)
    state = aggregator.init(like)
    encode = jax.jit(aggregator.secure_sum.encode)
    decode = jax.jit(lambda total, decode=aggregator.secure_sum.decode: decode(total, like))
    row = encode(updates[0], weights[0], weights[0], state, jnp.int32(0))
    jax.block_until_ready(decode(row))  # both are compiled
    began = time.process_time()
    vectors = {
        row: np.asarray(encode(updates[row], weights[row], weights[row], state, jnp.int32(row))) for row in range(count)
    }
    result = run_protocol(vectors, threshold=quorum(count), modulus_bits=codec.modulus_bits)
    mean = np.asarray(decode(result.total))
    cpu_s = time.process_time() - began
    up, down = (
        sum(sum(phase.values()) for phase in sent.values()) / count for sent in (result.bytes_up, result.bytes_down)
    )
    return Cost(mean, up, down, cpu_s)


class Nearby:
    """Flower's grid whose participants, one client each, answer at once."""

    def __init__(self, updates: np.ndarray, weights: np.ndarray):
        self.updates, self.weights, self.replies, self.sent, self.received = updates, weights, {}, 0, 0
        self.contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in range(1, len(updates) + 1)}

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def push_messages(self, messages: list[Message]) -> list[str]:
        return [self._push(copy.deepcopy(message)) for message in messages]

    def _push(self, message: Message) -> str:
        name, node = f"message {len(self.replies)}", message.metadata.dst_node_id
        message.metadata.__dict__["_message_id"] = name
        client = node - 1

        def ask_node(request: Envelope) -> Envelope:
            del request
            mean = self.updates[client].astype(np.float64).tobytes()
            return Envelope({"clients": {str(client): {}}, "weight": float(self.weights[client])}, {"mean": mean})

        if secagg_plus_client.is_secagg_plus(message):
            self.received += recorddict_to_proto(message.content).ByteSize()
            reply = secagg_plus_client.answer(message, self.contexts[node], ask_node)
            self.sent += recorddict_to_proto(reply.content).ByteSize()
        else:
            assert from_records(message.content).head["kind"] == "hello"
            hello = Envelope({"clients": {str(client): 1.0}, "base": "", "settings": {}})
            reply = Message(to_records(hello), reply_to=message)
        self.replies[name] = reply
        return name

    def pull_messages(self, names: list[str]) -> list[Message]:
        return [self.replies.pop(name) for name in names]


def with_secagg_plus(updates: np.ndarray, weights: np.ndarray) -> Cost:
    """The same by Flower's workflow and mod."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # as in a ServerApp
    grid = Nearby(updates, weights)
    link = GridLink(grid)
    fleet = Fleet(link, Expected({}, ""), timeout_s=600.0, say=lambda line: None)
    fleet.gather(set(range(len(updates))), 600.0)
    members = {client: {"weight": float(weight)} for client, weight in enumerate(weights)}
    protocol = secagg_plus(link, clip=CLIP, bits=BITS)
    secure_sum = secure(None, FixedPoint(clip=CLIP, bits=BITS, max_clients=2), max_weight=1.0).secure_sum
    assert secure_sum is not None
    began = time.process_time()
    result = protocol.run(fleet, {}, members, {}, secure_sum=secure_sum, num_values=updates.shape[1])
    cpu_s = time.process_time() - began
    assert result.total is not None, result.failure
    return Cost(result.total, grid.sent / len(updates), grid.received / len(updates), cpu_s)


def main(num_values: int, counts: list[int]) -> None:
    for count in counts:
        updates = np.random.default_rng(0).normal(0, 0.05, (count, num_values)).astype(np.float32)
        weights = np.arange(1, count + 1, dtype=np.float32)
        exact = weights.astype(np.float64) @ updates / weights.sum()
        for name, run in (("secagg", with_secagg), ("secagg_plus", with_secagg_plus)):
            cost = run(updates, weights)
            error = np.abs(cost.mean - exact)
            print(
                f"{count} participants, {name}: error {error.max():.1e} at most, {np.sqrt(np.mean(error**2)):.1e} rms; "
                f"{cost.sent:,.0f} bytes up and {cost.received:,.0f} down each; {cost.cpu_s:.2f} CPU s",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(word) for word in sys.argv[2:]])
