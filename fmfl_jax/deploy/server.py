"""The server half: the rounds of `run_rounds` with clients on nodes, joined by the round that the simulator compiles.

What comes back is decoded and checked, then takes the place of the clients' work in the same SPMD round (as in the
step-by-step execution), so aggregators, server optimizers, privacy, evaluation and checkpoints are the simulator's. Who
was silent is a client that was not delivered; whose update cannot be read or is not finite is dropped by name.
"""

import dataclasses
import pathlib
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.deploy.fingerprint import fingerprint
from fmfl_jax.deploy.fleet import Answers, Expected, Fleet, Link
from fmfl_jax.deploy.secure import SecureProtocol
from fmfl_jax.experiment.config.federation import FederationConfig
from fmfl_jax.experiment.config.network import NetworkConfig
from fmfl_jax.experiment.loop.participation import CohortSchedule, Record
from fmfl_jax.experiment.loop.records import read_history
from fmfl_jax.experiment.loop.rounds import Elsewhere, RoundView, Source, Work
from fmfl_jax.experiment.methods.algorithms import ALGORITHMS
from fmfl_jax.experiment.methods.attacks import ATTACKS, NoAttack
from fmfl_jax.experiment.methods.contributions import CONTRIBUTIONS
from fmfl_jax.experiment.methods.names import name_of
from fmfl_jax.experiment.methods.selections import Oort
from fmfl_jax.fed.aggregators.secure import of_total
from fmfl_jax.fed.core.cohort import put_on_devices
from fmfl_jax.fed.core.execution import client_program, pmap_round
from fmfl_jax.fed.core.round import Transport, server_context
from fmfl_jax.fed.core.types import ClientResult, Cohort, ServerState, Tree
from fmfl_jax.transport.codec import identity


def refusals(fed: FederationConfig, network: NetworkConfig | None) -> Iterator[str]:
    """What needs the simulator; nothing where the federation can run on real machines. Fields are name=value."""
    algorithm = f"algorithm={name_of(fed.algorithm, ALGORITHMS)}"
    if network is not None:
        yield f"network={network.network} needs the simulator: real machines have a network of their own"
    if not isinstance(fed.attack, NoAttack):
        yield f"attack={name_of(fed.attack, ATTACKS)} needs the simulator: nodes run the clients' honest update"
    if fed.contribution is not None:
        contribution = name_of(fed.contribution, CONTRIBUTIONS)
        yield f"contribution={contribution} needs the simulator: it evaluates models of all coalitions between rounds"
    if fed.algorithm.asynchronous:
        yield f"{algorithm} needs the simulator: its schedule is of simulated times"
    if "secure" in fed.privacy and fed.dp is not None and fed.dp.adaptive_quantile is not None:
        yield "privacy=dp,secure with dp_quantile needs the simulator: the clipped share of clients would be sent open"
    if "secure" in fed.privacy and isinstance(fed.selection, Oort):
        yield "privacy=secure with selection=oort needs the simulator: single losses are not sent"
    if fed.keeps_personal_models:
        yield f"{algorithm} with personal models needs the simulator, which evaluates each on its client's data"


def secagg_plus_refusals(fed: FederationConfig) -> Iterator[str]:
    """What Flower's SecAgg+ does not serve. Fields are name=value."""
    if "secure" not in fed.privacy:
        yield "secure_protocol=secagg_plus belongs to privacy=secure"
    if "dp" in fed.privacy:
        yield "secure_protocol=secagg_plus with privacy=dp: its rounding is not what the noise is calibrated to"


def on_nodes(
    link: Link,
    settings: dict[str, Any],
    *,
    has_base: bool,
    timeout_s: float,
    wait_s: float,
    secure: SecureProtocol | None = None,
    say: Callable[[str], None] = print,
) -> Elsewhere:
    """The `elsewhere` of `run_rounds` for clients that a link reaches.

    settings: what server and nodes must agree on. has_base: whether what is not trained is a base that both must hold.
    timeout_s: after which a round (of secure aggregation, each of its exchanges) closes with those who answered.
    wait_s: for all clients to be there at the start. secure: the protocol of secure aggregation, where it is asked for.
    Every round is checkpointed: nodes can go back one round with the server, not more.
    """

    def place(work: Work) -> Work:
        base = fingerprint(work.frozen) if has_base else ""
        fleet = Fleet(link, Expected(settings, base), timeout_s=timeout_s, say=say)
        fleet.gather(set(range(len(work.source.sizes))), wait_s)
        sizes = np.asarray([fleet.sizes[client] for client in range(len(work.source.sizes))], np.float32)
        remote = RemoteRound(work, fleet, base, say, secure)
        schedule = work.schedule
        if isinstance(schedule, CohortSchedule):
            if secure is not None and schedule.weighting is None:
                _require_dealt(sizes, work.source.sizes)
            schedule = dataclasses.replace(schedule, sizes=sizes)  # a client may have other data than was dealt
        return work._replace(
            config=dataclasses.replace(work.config, checkpoint_every=1),
            parts=remote.parts,
            source=Source(sizes=sizes, batches=lambda ids, round: (np.zeros((len(ids), 1), np.float32), None)),
            schedule=schedule,
            callbacks=dataclasses.replace(work.callbacks, after_round=(remote.figures,)),
            run=remote,
        )

    return place


def _require_dealt(sizes: np.ndarray, dealt: np.ndarray) -> None:
    """Raises ValueError where clients hold more or less than the server dealt: what is masked is scaled by the largest
    share, which every machine takes from its own copy of the text."""
    for client in np.flatnonzero(sizes != dealt)[:1]:
        raise ValueError(
            f"client {client}'s node deals it {sizes[client]:g} examples, the server {dealt[client]:g}: privacy=secure "
            "needs the same text on all machines, or weighting=uniform"
        )


class RemoteRound:
    """A RoundFn whose clients are elsewhere. parts: the round that joins what they send: without a codec, which was
    applied at the clients, and without client states, which stay there."""

    def __init__(self, work: Work, fleet: Fleet, base: str, say: Callable[[str], None], secure: SecureProtocol | None):
        algorithm = dataclasses.replace(work.parts.algorithm, init_client=None, traffic_follows_states=False)
        aggregator, self._secure, self._secure_sum = work.parts.aggregator, secure, work.parts.aggregator.secure_sum
        if self._secure_sum is not None:
            if secure is None:
                raise ValueError("privacy=secure needs keys by which clients know each other: see launch.flower_keys")
            self._secure_sum = secure.secure_sum(self._secure_sum)
            aggregator = of_total(dataclasses.replace(aggregator, secure_sum=self._secure_sum))
        self.parts = dataclasses.replace(work.parts, transport=Transport(), algorithm=algorithm, aggregator=aggregator)
        self._fleet, self._base, self._say = fleet, base, say
        self._codec = work.parts.transport.codec or identity()
        self._update_like = jax.eval_shape(algorithm.update_like, work.trainable)
        self._directory, self._server_batches = work.directory, work.source.server_batches
        self._join = pmap_round(self.parts, trained=True)
        self._reference = client_program(self.parts)
        self._run = run_name(work.directory)
        self._counted: dict[int, int] | None = None
        self._metric_names: list[str] | None = None
        self._figures: Record = {}

    def __call__(self, state: ServerState, frozen: Tree, cohort: Cohort, /):
        host = jax.tree.map(np.asarray, cohort)
        capacity, weights = host.client_ids.size, host.weights.reshape(-1)
        ids, weights = host.client_ids.reshape(-1)[weights > 0], weights[weights > 0]
        if self._counted is None:
            self._counted = counted_rounds(self._directory, int(state.round))
        began = time.perf_counter()
        members = {
            int(client): {"weight": float(weight), "counted": self._counted.get(int(client), 0), "row": row}
            for row, (client, weight) in enumerate(zip(ids, weights))
        }
        answers, results, dropped, of_server = self._exchange(state, members)
        seconds = time.perf_counter() - began
        trained = Cohort(
            ids.astype(np.int32),
            weights,
            self._stacked(ids, weights, results),
            delivered=np.asarray([int(client) in results for client in ids], bool),
            server_batches=self._of_server(state, frozen) if of_server is None else of_server,
        )
        clients_per_pass = self.parts.execution.clients_per_pass
        round = int(state.round)
        new = self._join(state, (), put_on_devices(trained, clients_per_pass=clients_per_pass, capacity=capacity))
        self._note(round, answers, results, dropped, seconds)
        return new

    def figures(self, view: RoundView) -> Record:
        """Of the last round, for its record: who arrived, was silent or dropped and why, bytes and seconds."""
        del view
        return self._figures

    def _exchange(self, state: ServerState, members: dict[int, dict]):
        """(Answers, {client: (update, metrics)}, {client: why it is dropped}, what the server's own data give or, of
        secure aggregation, the sum; None for none)."""
        head = {"kind": "train", "run": self._run, "round": int(state.round), "base": self._base}
        blobs = {"message": as_bytes(self.parts.algorithm.broadcast(state))}
        if self._secure is None or self._secure_sum is None:
            answers = self._fleet.ask(head, members, blobs)
            return answers, *self._read(answers), None
        num_values = self._secure_sum.num_values(self._update_like)
        blobs |= {"aggregator": as_bytes(state.aggregator)}
        result = self._secure.run(self._fleet, head, members, blobs, secure_sum=self._secure_sum, num_values=num_values)
        if result.failure is not None:
            self._say(f"round {int(state.round) + 1} is void: {result.failure}")
        total = np.zeros(num_values, np.uint32) if result.total is None else result.total
        fields = {client: {} for client in result.survivors}
        answers = Answers(fields, {}, result.silent, result.dropped, result.sent_bytes, result.received_bytes)
        nothing = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self._update_like)
        results = {client: (nothing, {}) for client in result.survivors}
        dropped = {client: why for client, why in result.dropped.items() if client not in results}
        return answers, results, dropped, ClientResult(total, jnp.float32(0), (), {})

    def _read(self, answers: Answers) -> tuple[dict[int, tuple[Tree, dict[str, float]]], dict[int, str]]:
        """({client: (update, metrics)}, {client: why it is dropped}). Who is not finite is in both: the round itself
        leaves it out."""
        results, dropped = {}, dict(answers.refused)
        if self._metric_names is None:  # as most clients have them: one that sends others is the one that is dropped
            sent = [fields.get("metrics") for fields in answers.fields.values()]
            names = Counter(
                tuple(sorted(metrics)) for metrics in sent if isinstance(metrics, dict) and "loss" in metrics
            )
            self._metric_names = list(names.most_common(1)[0][0]) if names else None
        for client, fields in sorted(answers.fields.items()):
            try:
                update = self._codec.decode(answers.blobs[client], self._update_like)
                metrics = self._metrics(fields.get("metrics"))
            except ValueError as error:
                dropped[client] = str(error)
                continue
            results[client] = update, metrics
            if not all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in jax.tree.leaves(results[client])):
                dropped[client] = "its update is not finite"
        return results, dropped

    def _metrics(self, sent: Any) -> dict[str, float]:
        """A client's metrics, of the same names in all rounds. Raises ValueError."""
        if not isinstance(sent, dict) or not all(isinstance(x, float) for x in sent.values()):
            raise ValueError("its metrics are no numbers by name")
        if sorted(sent) != self._metric_names:
            raise ValueError(f"its metrics are {sorted(sent)}, expected {self._metric_names}")
        return sent

    def _stacked(self, ids, weights, results: dict) -> ClientResult:
        """ClientResults [K, ...]; zeros of those who are not there. The weights are the server's, whatever was sent."""
        nothing = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self._update_like)
        names = [] if self._secure_sum is not None else self._metric_names or ["loss"]
        no_metrics = dict.fromkeys(names, 0.0)
        rows = [results.get(int(client), (nothing, no_metrics)) for client in ids]
        updates = (
            jax.tree.map(lambda *x: np.stack(x), *[update for update, _ in rows])
            if rows
            else jax.tree.map(lambda x: np.zeros((0, *x.shape), x.dtype), nothing)
        )
        metrics = {name: jnp.asarray([row[name] for _, row in rows], jnp.float32) for name in no_metrics}
        return ClientResult(updates, weights.astype(np.float32), (), metrics)

    def _of_server(self, state: ServerState, frozen: Tree) -> Tree:
        """The client update on the server's own data, for aggregators that compare with it."""
        if self._server_batches is None:
            return None
        here, frozen = jax.tree.map(lambda x: x.addressable_data(0), (state, frozen))
        return self._reference(
            server_context(self.parts.algorithm, here, frozen), self._server_batches(int(state.round))
        )

    def _note(self, round: int, answers: Answers, results: dict, dropped: dict[int, str], seconds: float) -> None:
        """The round's figures, a line for what went wrong, and whose update counted."""
        assert self._counted is not None
        arrived = [client for client in sorted(results) if client not in dropped]
        self._counted |= dict.fromkeys(arrived, round + 1)
        times = [float(fields.get("seconds", 0.0)) for fields in answers.fields.values()]
        self._figures = {
            "arrived": arrived,
            "silent": answers.silent,
            "dropped": {str(client): why for client, why in sorted(dropped.items())},
            "sent_bytes": answers.sent_bytes,
            "received_bytes": answers.received_bytes,
            "exchange_s": seconds,
            "client_s": max(times, default=0.0),
        }
        trouble = [f"client {client} was silent" for client in answers.silent]
        trouble += [f"client {client} is dropped: {why}" for client, why in sorted(dropped.items())]
        if trouble:
            count = len(arrived) + len(trouble)
            self._say(f"round {round + 1}: {len(arrived)} of {count} counted in {seconds:.1f} s; {'; '.join(trouble)}")


def as_bytes(tree: Tree) -> bytes:
    """A tree as a message, as it is."""
    host, codec = jax.device_get(tree), identity()
    return codec.encode(host, codec.init(host), jax.random.key(0))[0]


def run_name(directory: pathlib.Path) -> str:
    """A name that no other run has, kept with the run: clients' states of another are not to be taken for its own."""
    path = directory / "run_name"
    if not path.exists():
        path.write_text(secrets.token_hex(16), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def counted_rounds(directory: pathlib.Path, round: int) -> dict[int, int]:
    """{client: the last round in which its update counted}, from the records of a run that goes on."""
    if round == 0:
        return {}
    history = read_history(directory, up_to_round=round)
    return {client: record["round"] for record in history for client in record.get("arrived", ())}
