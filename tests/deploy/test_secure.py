"""Secure aggregation over envelopes: the sum is the simulator's, and clients may vanish in mid-protocol."""

import dataclasses

import jax
import numpy as np
import pytest

from fmfl_jax.deploy.client import Node
from fmfl_jax.deploy.secure import Identities, secagg
from fmfl_jax.deploy.server import on_nodes
from fmfl_jax.experiment.config.cross_device import CrossDeviceConfig
from fmfl_jax.experiment.config.federation import DpConfig, FederationConfig
from fmfl_jax.experiment.cross_device import run_cross_device
from fmfl_jax.experiment.methods.selections import Poisson
from fmfl_jax.fed.secure import crypto
from tests.deploy.links import SETTINGS, Direct, Losing, side_of
from tests.experiment.toys import small_task

SIGNING = {client: bytes([client + 1] * 32) for client in range(6)}
VERIFY = {client: crypto.verify_key(key) for client, key in SIGNING.items()}
SECURE = FederationConfig(privacy=("secure",))
PRIVATE = FederationConfig(privacy=("secure", "dp"), dp=DpConfig(clip=0.1, noise_multiplier=0.5), selection=Poisson())


def run(directory, elsewhere=None, *, federation=SECURE, num_rounds=2):
    config = CrossDeviceConfig(num_rounds=num_rounds, cohort_size=6, seed=5, eval_every=1, federation=federation)
    return run_cross_device(config, *small_task(6), directory, elsewhere=elsewhere)


def nodes_with_keys(folder, *, spoil=None, verify=VERIFY, lines=None, more=0):
    """Six nodes of one client each, which has `more` examples than the server believes."""

    def place(work):
        identities = [Identities(VERIFY, {n: SIGNING[n]}) for n in range(6)]
        side = side_of(work)
        side = side._replace(source=dataclasses.replace(side.source, sizes=side.source.sizes + more))
        nodes = {n: Node(side, [n], folder / str(n), identities[n]) for n in range(6)}
        say = (lambda line: None) if lines is None else lines.append
        link = Direct(nodes, spoil)
        secure = None if verify is None else secagg(verify)
        return on_nodes(link, SETTINGS, has_base=False, timeout_s=5, wait_s=1, secure=secure, say=say)(work)

    return place


@pytest.fixture(autouse=True)
def one_device(only_devices):
    only_devices(1)


@pytest.mark.parametrize("federation", [SECURE, PRIVATE], ids=["secure", "dp"])
def test_the_sum_of_masked_updates_is_the_simulators(federation, tmp_path):
    here = run(tmp_path / "here", federation=federation)
    there = run(tmp_path / "there", nodes_with_keys(tmp_path / "nodes"), federation=federation)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), here.state.params, there.state.params)
    assert all("loss" not in record for record in there.history)


def test_clients_that_vanish_before_and_after_masking(tmp_path):
    """In the first round one before: it is out of the sum. In the second one after: it is in, and the others unmask."""
    sessions = []

    def spoil(head, node, answer):
        if head["kind"] != "secure":
            return answer
        sessions.extend([] if head["session"] in sessions else [head["session"]])
        phase, first = head["phase"], len(sessions) == 1
        if first and node == 1 and phase in ("masked_input", "consistency_check", "unmasking"):
            return None
        return None if not first and node == 2 and phase in ("consistency_check", "unmasking") else answer

    there = run(tmp_path / "there", nodes_with_keys(tmp_path / "nodes", spoil=spoil))
    first, second = there.history[1:]
    assert first["arrived"] == [0, 2, 3, 4, 5] and first["silent"] == [1] and first["counted_clients"] == 5
    assert second["arrived"] == [0, 1, 2, 3, 4, 5] and second["silent"] == []

    lost = iter([[1], []])
    here = run(tmp_path / "here", lambda work: work._replace(schedule=Losing(work.schedule, lost)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), here.state.params, there.state.params)


def test_too_few_leave_the_model_as_it_was_and_the_line_says_why(tmp_path):
    spoil = lambda head, node, answer: None if node < 3 and head.get("phase") == "masked_input" else answer
    lines = []
    there = run(tmp_path / "there", nodes_with_keys(tmp_path / "nodes", spoil=spoil, lines=lines), num_rounds=1)
    assert there.history[1]["arrived"] == [] and there.history[1]["counted_clients"] == 0
    assert all(not np.any(x) for x in jax.tree.leaves(there.state.params))
    assert any("round 1 is void" in line and "threshold" in line for line in lines)


def test_a_node_refuses_to_send_a_single_update_and_a_server_without_keys(tmp_path):
    with pytest.raises(ValueError, match="needs keys"):
        run(tmp_path / "run", nodes_with_keys(tmp_path / "nodes", verify=None))
    forged = VERIFY | {3: VERIFY[4]}  # the server names another key: the clients have their own list
    lines = []
    run(tmp_path / "forged", nodes_with_keys(tmp_path / "nodes", verify=forged, lines=lines), num_rounds=1)
    assert any("client 3 is dropped" in line for line in lines)


def test_machines_with_other_texts_are_refused_unless_all_weigh_the_same(tmp_path):
    with pytest.raises(ValueError, match="client 0's node deals it .* needs the same text on all machines"):
        run(tmp_path / "other", nodes_with_keys(tmp_path / "nodes", more=1))
    uniform = dataclasses.replace(SECURE, weighting="uniform")
    there = run(tmp_path / "uniform", nodes_with_keys(tmp_path / "more", more=1), federation=uniform, num_rounds=1)
    assert there.history[1]["counted_clients"] == 6
