"""A node: the clients of one machine, the same client update that the simulator compiles, and what they keep.

A node stays alive over all rounds, so weights are loaded and programs compiled once. It answers envelopes:

    hello     -> which clients it has, how many examples each, the fingerprint of its base, its settings
    train     -> of each client that is asked for: its update as the codec's bytes, its metrics
    secure    -> of each client that is asked for: its message of a phase of secure aggregation (secure.py)
    mean      -> the weighted mean of the clients that are asked for, for Flower's SecAgg+ to mask (secagg_plus.py)

What a client keeps between rounds (SCAFFOLD's control variate, error feedback) lies in a store of its own on the node's
disk, as it will be if its update counts and as it will be if not: the server's next message says which it was, also
after a crash of either side.
"""

import contextlib
import functools
import pathlib
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax import streams
from fmfl_jax.deploy.envelope import Envelope
from fmfl_jax.deploy.secure import Identities, Sessions
from fmfl_jax.experiment.loop.client_store import ClientStore
from fmfl_jax.experiment.loop.rounds import Source
from fmfl_jax.fed.core.execution import client_program
from fmfl_jax.fed.core.round import Round, all_finite, client_key, kept_state
from fmfl_jax.fed.core.types import ClientContext, ClientResult, ClientState, Params, ServerState, Tree
from fmfl_jax.transport.codec import identity, keep_lost
from fmfl_jax.transport.message import HEADER_BYTES


class ClientSide(NamedTuple):
    """What the simulator would train with. parts: of the round. trainable: as they start. frozen: what is not trained.
    source: the clients' batches; only those of the node's own are asked for. seed: of the run. settings: {name: value},
    what both sides must agree on. base: the fingerprint of the base; "" where there is none."""

    parts: Round
    trainable: Params
    frozen: Tree
    source: Source
    seed: int
    settings: dict[str, Any]
    base: str


class Trained(NamedTuple):
    """A client's result before it is sent. update: as the algorithm made it. metrics: floats. message: the codec's
    bytes."""

    result: ClientResult
    metrics: dict[str, float]
    message: bytes


class Node:
    """The clients of one machine. directory: for what they keep. identities: their keys, for this project's secure
    aggregation. for_secagg_plus: whether Flower's takes its place."""

    def __init__(
        self,
        side: ClientSide,
        clients: list[int],
        directory: str | pathlib.Path,
        identities: Identities | None = None,
        *,
        for_secagg_plus: bool = False,
    ):
        num_clients = len(side.source.sizes)
        if not clients or len(set(clients)) < len(clients):
            raise ValueError("a node needs clients, each named once")
        if any(not 0 <= client < num_clients for client in clients):
            raise ValueError(f"clients={','.join(map(str, clients))}: expected numbers from 0 to {num_clients - 1}")
        self.side, self.clients, self.directory = side, clients, pathlib.Path(directory)
        algorithm = side.parts.algorithm
        self._run = client_program(side.parts)
        state = jax.eval_shape(lambda params: side.parts.init(params, side.seed), side.trainable)
        self._message_like = jax.eval_shape(algorithm.broadcast, state)
        self._aggregator_like = state.aggregator
        self._codec = side.parts.transport.codec or identity()
        self._sessions = None if identities is None or for_secagg_plus else Sessions(identities)
        self._for_secagg_plus = for_secagg_plus

    def answer(self, request: Envelope) -> Envelope:
        """The answer to a request; {"error": one line} to one that cannot be served."""
        try:
            match request.head.get("kind"):
                case "hello":
                    return self.hello()
                case "train":
                    return self.train(request)
                case "secure":
                    return self.secure(request)
                case "mean":
                    return self.mean(request)
            raise ValueError(f"this node knows no request {request.head.get('kind')!r}")
        except (ValueError, KeyError, TypeError, OSError) as error:
            return Envelope({"error": " ".join(f"{error}".split()) or type(error).__name__})

    def hello(self) -> Envelope:
        """Who is here."""
        sizes = {str(client): float(self.side.source.sizes[client]) for client in self.clients}
        return Envelope({"clients": sizes, "base": self.side.base, "settings": self.side.settings})

    def train(self, request: Envelope) -> Envelope:
        """A round of the clients that are asked for, one after another."""
        if self.side.parts.aggregator.secure_sum is not None:
            raise ValueError("this node sends masked integers only (privacy=secure), no single update")
        head, message, fields, blobs = request.head, self._message(request), {}, {}
        for name, asked in head["clients"].items():
            began = time.perf_counter()
            trained = self.train_one(int(name), asked, head, message)
            fields[name] = {"metrics": trained.metrics, "seconds": time.perf_counter() - began}
            blobs[name] = trained.message
        return Envelope({"clients": fields}, blobs)

    def secure(self, request: Envelope) -> Envelope:
        """A phase of secure aggregation. Raises ValueError where this node takes no part in it."""
        secure_sum, head = self.side.parts.aggregator.secure_sum, request.head
        if secure_sum is None or self._sessions is None:
            raise ValueError("this node has no keys for secure aggregation, or was started without privacy=secure")
        if head["modulus_bits"] != secure_sum.modulus_bits:
            raise ValueError(f"the server sums {head['modulus_bits']} bits, this node {secure_sum.modulus_bits}")

        def vector_of(client: int) -> np.ndarray:
            asked = head["clients"][str(client)]
            trained = self.train_one(client, asked, head, self._message(request))
            update = self._codec.decode(trained.message, trained.result.update)
            state = identity().decode(request.blobs["aggregator"], self._aggregator_like)
            return self._encode(update, asked["weight"], asked["row"], state)

        return self._sessions.answer(request, vector_of)

    def mean(self, request: Envelope) -> Envelope:
        """Of the clients that are asked for: float64 [n], what Flower's mod masks, and their weight. Who is not finite
        is left out. Raises ValueError where this node was not started for it."""
        if not self._for_secagg_plus:
            raise ValueError("this node was not started for Flower's SecAgg+ (secure_protocol=secagg_plus)")
        message, fields, weight = self._message(request), {}, 0.0
        like = jax.eval_shape(self.side.parts.algorithm.update_like, self.side.trainable)
        total = np.zeros(sum(x.size for x in jax.tree.leaves(like)))
        for name, asked in request.head["clients"].items():
            began = time.perf_counter()
            trained = self.train_one(int(name), asked, request.head, message)
            update = self._codec.decode(trained.message, trained.result.update)
            if not bool(all_finite(update)):
                fields[name] = {"error": "its update is not finite"}
                continue
            weight += asked["weight"]
            total += asked["weight"] * np.concatenate([np.ravel(x) for x in jax.tree.leaves(update)])
            fields[name] = {"seconds": time.perf_counter() - began}
        return Envelope({"clients": fields, "weight": weight}, {"mean": (total / (weight or 1.0)).tobytes()})

    def _encode(self, update: Tree, weight: float, row: int, state: Tree) -> np.ndarray:
        """What a client masks: clipped where privacy asks for it, in fixed point; zeros of what is not finite."""
        aggregator = self.side.parts.aggregator
        assert aggregator.secure_sum is not None
        if aggregator.transform_update is not None:
            update, _ = aggregator.transform_update(update, state)
        weight = weight if bool(all_finite(update)) else 0.0
        numbers = jnp.float32(weight), jnp.float32(weight)
        return np.asarray(aggregator.secure_sum.encode(update, *numbers, state, jnp.int32(row)))

    def _message(self, request: Envelope) -> Tree:
        """What the server sent for a round. Raises ValueError for another base, or bytes that are no message."""
        if request.head["base"] != self.side.base:
            raise ValueError(f"this node holds the base {self.side.base}, the server trains {request.head['base']}")
        return identity().decode(request.blobs["message"], self._message_like)

    def train_one(self, client: int, asked: dict, head: dict, message: Tree) -> Trained:
        """One client's round. asked: {"weight": its weight in the mean, "counted": the last round of its own that
        counted, 0 for none}. head: {"run", "round"}."""
        if client not in self.clients:
            raise ValueError(f"client {client} is not on this node, which has {self.clients}")
        round = int(head["round"])
        key = client_key(ServerState((), (), jnp.int32(round), jnp.uint32(self.side.seed)), jnp.int32(client))
        batches, num_steps = self.side.source.batches(np.asarray([client], np.int32), round)
        batches = jax.tree.map(lambda x: x[0], batches)
        num_steps = None if num_steps is None else jnp.int32(num_steps[0])
        with self._store(head["run"], client, round, int(asked["counted"])) as (before, keep):
            kept = before.algorithm if self.side.parts.algorithm.init_client is not None else ()
            context = ClientContext(
                message, self.side.frozen, kept, jnp.int32(client), jnp.float32(asked["weight"]), num_steps, key
            )
            result = self._run(context, batches)
            trained, counted, lost = self._send(result, before, key)
            keep({"counted": counted, "lost": lost})
        return trained

    def _send(self, result: ClientResult, before: ClientState, key: jax.Array):
        """(what is sent, what the client keeps if its update counts, what if not)."""
        update, metrics, after = result.update, dict(result.metrics), ClientState(algorithm=result.state)
        finite = all_finite((update, metrics, result.state))
        coded = before.codec if self.side.parts.transport.codec else self._codec.init(update)
        message, coded = self._codec.encode(update, coded, jax.random.fold_in(key, streams.CODEC))
        lost = after
        if self.side.parts.transport.codec is not None:
            decoded = self._codec.decode(message, update)
            metrics["payload_bits"] = jnp.float32(8 * (len(message) - HEADER_BYTES))
            metrics["entropy_bits"] = coded.entropy_bits
            finite &= all_finite((decoded, coded))
            lost = after._replace(codec=keep_lost(coded, decoded, False))
            after = after._replace(codec=keep_lost(coded, decoded, True))
        of_counted = kept_state(before, after, delivered=True, finite=finite)
        of_lost = kept_state(before, lost, delivered=False, finite=finite)
        return Trained(result, {name: float(x) for name, x in metrics.items()}, message), of_counted, of_lost

    @contextlib.contextmanager
    def _store(self, run: str, client: int, round: int, counted: int):
        """(what the client keeps before this round, keep(what it keeps after it)).

        Raises ValueError where its state is older than what the server counted: it was lost, and to go on from a fresh
        one would be another algorithm.
        """
        parts = self.side.parts
        if not parts.keeps_client_states:
            yield ClientState(), lambda rows: None
            return
        if not re.fullmatch("[0-9a-f]{32}", run):
            raise ValueError("a run's name has 32 hexadecimal digits")
        folder = self.directory / run / str(client)
        step = max((s for s in ClientStore.steps(folder) if s <= round), default=0)
        if step < counted:
            raise ValueError(
                f"client {client}: its state on this node is of round {step}, but the server counted its update of "
                f"round {counted}: the node's folder was lost or is another"
            )

        def first(number):
            state = parts.init_client(self.side.trainable, number)
            return {"counted": state, "lost": state}

        store = ClientStore.open(folder, len(self.side.source.sizes), functools.partial(first), step=step)
        with contextlib.closing(store):
            row = jax.tree.map(lambda x: x[0], store.gather([client]))

            def keep(rows):
                store.scatter([client], jax.tree.map(lambda x: np.asarray(x)[None], rows))
                store.commit(round + 1)

            yield row["counted" if step == counted else "lost"], keep
