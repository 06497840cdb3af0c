"""Which node has which client: greeted once, checked, asked in every round, and given up after a time.

A node that comes back has a new number of the carrier's, so clients are found by what nodes say in their hello; the
newest answer holds. A node that was silent is greeted before it is given work again, with a short limit, so that a dead
one costs its whole time only once.
"""

import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol

from fmfl_jax.deploy.envelope import Envelope, num_bytes

_AGAIN_S = 30.0  # until a node that was refused is greeted again: it may have been started anew
_HELLO_S = 60.0  # the longest that a greeting is waited for: a machine under load starts Flower's process late
_FIRST_HELLO_S = 180.0  # of a node that was never there before


class Link(Protocol):
    """What carries envelopes."""

    def nodes(self) -> list[int]:
        """The nodes that are connected, by the carrier's numbers, the newest last."""
        ...

    def exchange(self, requests: dict[int, Envelope], timeout_s: float) -> dict[int, Envelope]:
        """The answers to requests by node, without those that did not come in time."""
        ...


class Expected(NamedTuple):
    """What a node must agree with. settings: {name: value}. base: the fingerprint."""

    settings: dict[str, Any]
    base: str


class Answers(NamedTuple):
    """fields: {client: what its node says of it}. blobs: {client: bytes}. silent: clients of whom nothing came in time.
    refused: {client: why it has no answer}. sent_bytes, received_bytes: of all nodes."""

    fields: dict[int, dict]
    blobs: dict[int, bytes]
    silent: list[int]
    refused: dict[int, str]
    sent_bytes: int
    received_bytes: int


class Fleet:
    """The nodes as the server knows them. timeout_s: how long a round waits. say: gets a line for each node that is
    refused or comes."""

    def __init__(self, link: Link, expected: Expected, *, timeout_s: float, say: Callable[[str], None] = print):
        self._link, self._expected, self._say = link, expected, say
        self.timeout_s = timeout_s
        self._node_of: dict[int, int] = {}
        self._used: set[int] = set()
        self._suspect: set[int] = set()
        self._refused_at: dict[int, float] = {}
        self.sizes: dict[int, float] = {}

    def gather(self, clients: set[int], wait_s: float) -> None:
        """Waits until all of these clients are there. Raises ValueError, naming the missing, after wait_s."""
        until = time.monotonic() + wait_s
        while True:
            self.greet()
            missing = sorted(clients - set(self._node_of))
            if not missing:
                return
            if time.monotonic() > until:
                raise ValueError(f"no node came with client {', '.join(map(str, missing))} in {wait_s:g} s")
            time.sleep(0.5)

    def greet(self) -> None:
        """Says hello to nodes that are new or were silent."""
        since = time.monotonic() - _AGAIN_S
        new = [
            node
            for node in self._link.nodes()
            if (node not in self._used or node in self._suspect) and self._refused_at.get(node, since) <= since
        ]
        if not new:
            return
        hello = Envelope({"kind": "hello"})
        limit_s = _HELLO_S if self._used.issuperset(new) else _FIRST_HELLO_S
        answers = self._link.exchange(dict.fromkeys(new, hello), min(limit_s, self.timeout_s))
        for node in new:
            if node in answers:
                self._suspect.discard(node)
                why = self._meet(node, answers[node].head)
                if why is not None:
                    self._refused_at[node] = time.monotonic()
                    self._say(why)

    def ask(
        self,
        head: dict,
        members: dict[int, dict],
        blobs: dict[str, bytes],
        own: dict[int, dict[str, bytes]] | None = None,
    ) -> Answers:
        """The same request about each client of `members` ({client: what only it is told}) to the nodes that have them.
        own: further blobs, for a client's node alone."""
        requests, silent = self.requests(head, members, blobs, own)
        replies = self._link.exchange(requests, self.timeout_s) if requests else {}
        silent += self.missing(requests, replies)
        fields, answered, refused = {}, {}, {}
        for node, reply in replies.items():
            for client in clients_of(requests[node]):
                found = reply.head.get("clients", {}).get(str(client))
                if found is None or str(client) not in reply.blobs:
                    why = reply.head.get("error", "its node's answer has nothing of it")
                    refused[client] = str((found or {}).get("error", why))
                else:
                    fields[client], answered[client] = found, reply.blobs[str(client)]
        up, down = (sum(map(num_bytes, envelopes.values())) for envelopes in (replies, requests))
        return Answers(fields, answered, sorted(silent), refused, down, up)

    def requests(
        self,
        head: dict,
        members: dict[int, dict],
        blobs: dict[str, bytes],
        own: dict[int, dict[str, bytes]] | None = None,
    ) -> tuple[dict[int, Envelope], list[int]]:
        """(what `ask` sends by node, clients whose node is not there)."""
        self.greet()
        requests, silent = {}, []
        for client, told in members.items():
            node = self._node_of.get(client)
            if node is None or node in self._suspect:
                silent.append(client)
                continue
            request = requests.setdefault(node, Envelope(head | {"clients": {}}, dict(blobs)))
            request.head["clients"][str(client)] = told
            request.blobs.update({} if own is None else own[client])
        return requests, silent

    def missing(self, requests: dict[int, Envelope], answered: Collection[int]) -> list[int]:
        """The clients of nodes that did not answer, who are greeted before they are asked again."""
        gone = [node for node in requests if node not in answered]
        self._suspect.update(gone)
        return [client for node in gone for client in clients_of(requests[node])]

    def _meet(self, node: int, said: dict) -> str | None:
        """Takes a node's clients, or says why not."""
        if "error" in said:
            return f"a node is refused: {said['error']}"
        names = ", ".join(sorted(said.get("clients", {}), key=int))
        if said.get("base") != self._expected.base:
            holds = f"it holds the base {said.get('base')}, the server {self._expected.base}"
            return f"the node with client {names} is refused: {holds}"
        differing = differences(said.get("settings", {}), self._expected.settings)
        if differing:
            return f"the node with client {names} is refused: it was started with {differing}"
        for name, size in said["clients"].items():
            self._node_of[int(name)], self.sizes[int(name)] = node, float(size)
        self._used.add(node)
        self._say(f"a node with client {names} is here")
        return None


def clients_of(request: Envelope) -> list[int]:
    """Whom a request is about."""
    return [int(name) for name in request.head["clients"]]


def differences(theirs: dict, ours: dict) -> str:
    """ "name=theirs in place of ours" of the settings that differ, at most three; "" where none do."""
    names = [name for name in sorted(theirs | ours) if theirs.get(name) != ours.get(name)]
    shown = [f"{name}={theirs.get(name)} in place of {ours.get(name)}" for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
