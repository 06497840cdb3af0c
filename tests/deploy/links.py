"""Nodes in the test's own process: the whole path of a round but for Flower, with faults on demand."""

import dataclasses
from collections.abc import Callable

import numpy as np

from fmfl_jax.deploy.client import ClientSide, Node
from fmfl_jax.deploy.server import on_nodes

SETTINGS = {"rounds.seed": 0}


class Direct:
    """A link to nodes by their numbers. spoil(round, node, answer) -> another answer, or None for silence."""

    def __init__(self, nodes: dict[int, Node], spoil: Callable | None = None):
        self.members, self.spoil, self.asked = nodes, spoil, []

    def nodes(self):
        return list(self.members)

    def exchange(self, requests, timeout_s):
        answers = {}
        for node, request in requests.items():
            self.asked.append((request.head["kind"], node))
            answer = self.members[node].answer(request)
            if self.spoil is not None:
                answer = self.spoil(request.head, node, answer)
            if answer is not None:
                answers[node] = answer
        return answers


def side_of(work, settings=SETTINGS, base="") -> ClientSide:
    return ClientSide(work.parts, work.trainable, work.frozen, work.source, work.config.seed, settings, base)


def nearby(folder, *, spoil=None, num_nodes=2, say=lambda line: None, links=None):
    """`elsewhere` with the clients dealt in turn to nodes of this process."""

    def place(work):
        clients = range(len(work.source.sizes))
        nodes = {n: Node(side_of(work), list(clients[n::num_nodes]), folder / str(n)) for n in range(num_nodes)}
        link = Direct(nodes, spoil)
        if links is not None:
            links.append(link)
        return on_nodes(link, SETTINGS, has_base=False, timeout_s=5, wait_s=1, say=say)(work)

    return place


@dataclasses.dataclass
class Losing:
    """A schedule of which some updates are lost."""

    inner: object
    lost: object

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def draw(self, state, round, uplink_bits=None):
        state, participation = self.inner.draw(state, round, uplink_bits)
        return state, participation._replace(delivered=~np.isin(participation.client_ids, next(self.lost)))
