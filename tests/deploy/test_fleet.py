"""Which node has which client, by fake links: greetings, refusals, silence, returns."""

import pytest

from fmfl_jax.deploy.envelope import Envelope
from fmfl_jax.deploy.fleet import Expected, Fleet

SETTINGS = {"seed": 0, "peft": "lora"}


class Fake:
    """Nodes {number: (clients, base, settings) or None for a dead one}."""

    def __init__(self, **nodes):
        self.members, self.limits = {int(name[1:]): node for name, node in nodes.items()}, []

    def nodes(self):
        return list(self.members)

    def exchange(self, requests, timeout_s):
        answers = {}
        for node, request in requests.items():
            self.limits.append((request.head["kind"], node, timeout_s))
            if self.members[node] is None:
                continue
            clients, base, settings = self.members[node]
            if request.head["kind"] == "hello":
                sizes = {str(c): 10.0 + c for c in clients}
                answers[node] = Envelope({"clients": sizes, "base": base, "settings": settings})
            else:
                asked = request.head["clients"]
                answers[node] = Envelope({"clients": {c: {"at": node} for c in asked}}, {c: b"x" for c in asked})
        return answers


def fleet_of(link, lines):
    return Fleet(link, Expected(SETTINGS, "b" * 64), timeout_s=100, say=lines.append)


def test_another_base_and_other_settings_are_refused_with_both():
    lines = []
    link = Fake(
        n1=([0], "b" * 64, SETTINGS), n2=([1], "c" * 64, SETTINGS), n3=([2], "b" * 64, SETTINGS | {"peft": "x"})
    )
    fleet = fleet_of(link, lines)
    with pytest.raises(ValueError, match="no node came with client 1, 2"):
        fleet.gather({0, 1, 2}, wait_s=0)
    assert any("client 1 is refused" in line and "b" * 64 in line and "c" * 64 in line for line in lines)
    assert any("client 2 is refused: it was started with peft=x in place of lora" in line for line in lines)
    assert fleet.sizes == {0: 10.0}


def test_a_dead_node_costs_its_time_once_and_its_successor_takes_its_clients():
    lines, members = [], {0: {}, 1: {}}
    link = Fake(n1=([0], "b" * 64, SETTINGS), n2=([1], "b" * 64, SETTINGS))
    fleet = fleet_of(link, lines)
    fleet.gather({0, 1}, wait_s=0)
    assert fleet.ask({"kind": "train"}, members, {}).silent == []
    link.members[2] = None
    assert fleet.ask({"kind": "train"}, members, {}).silent == [1]
    link.limits.clear()
    answers = fleet.ask({"kind": "train"}, members, {})
    assert answers.silent == [1] and ("train", 2, 100) not in link.limits
    assert [limit for limit in link.limits if limit[1] == 2] == [("hello", 2, 60)]
    link.members[7] = ([1], "b" * 64, SETTINGS)  # the same machine, with a new number
    answers = fleet.ask({"kind": "train"}, members, {})
    assert answers.silent == [] and answers.fields[1] == {"at": 7}
