"""Flower's SecAgg+ with its workflow, its mod and this project's ClientApp in one process: the mean is the simulator's,
and what happens when a node leaves in mid-protocol."""

import contextlib
import copy
import functools

import jax
import numpy as np
import pytest
from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fmfl_jax.deploy import channel
from fmfl_jax.deploy.client import Node
from fmfl_jax.deploy.envelope import Envelope
from fmfl_jax.deploy.flower import GridLink
from fmfl_jax.deploy.secagg_plus import secagg_plus
from fmfl_jax.deploy.server import on_nodes
from fmfl_jax.experiment.config.cross_device import CrossDeviceConfig
from fmfl_jax.experiment.config.federation import FederationConfig
from fmfl_jax.experiment.cross_device import run_cross_device
from launch.flower_app.fmfl_client import app
from tests.deploy.links import SETTINGS, Losing, side_of
from tests.experiment.toys import small_task


class NearbyGrid:
    """Flower's grid whose ClientApps run when they are sent something. paths: of each node's channel. lost(round,
    stage, node): whether the node does not answer; stage "" before the protocol. tamper(stage, configs): what the
    server changes in a message. shares: how many each node gave away in the last unmasking."""

    def __init__(self, paths, lost, tamper):
        self.lost, self.tamper, self.round, self.replies, self.shares = lost, tamper, 0, {}, []
        self.contexts = {node: Context(1, node, {"channel": path}, RecordDict(), {}) for node, path in paths.items()}

    def get_node_ids(self):
        return list(self.contexts)

    def push_messages(self, messages):
        return [self.push(copy.deepcopy(message)) for message in messages]

    def push(self, message):
        name, node = f"message {len(self.replies)}", message.metadata.dst_node_id
        message.metadata.__dict__["_message_id"] = name
        configs = message.content.config_records.get("secaggplus_configs", {})
        stage = configs.get("stage", "")
        self.tamper(stage, configs)
        if stage == "setup" and node == min(self.contexts):
            self.round += 1
        if not self.lost(self.round, stage, node):
            with contextlib.suppress(Exception):  # of a ClientApp that fails nothing but Flower's own error comes
                self.replies[name] = [app(message, self.contexts[node])]
            if stage == "unmask":
                self.shares += [len(r.content["secaggplus_configs"]["shares"]) for r in self.replies.get(name, [])]
        self.replies.setdefault(name, [])
        return name

    def pull_messages(self, names):
        return [reply for name in names for reply in self.replies.pop(name, [])]


@pytest.fixture(autouse=True)
def in_a_serverapp(only_devices, monkeypatch):
    only_devices(1)
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def run(directory, elsewhere=None, *, num_rounds=2):
    federation = FederationConfig(privacy=("secure",))
    config = CrossDeviceConfig(num_rounds=num_rounds, cohort_size=8, seed=5, eval_every=1, federation=federation)
    return run_cross_device(config, *small_task(8), directory, elsewhere=elsewhere)


def four_nodes(
    folder,
    *,
    lost=lambda round, stage, node: False,
    tamper=lambda stage, configs: None,
    say=lambda line: None,
    grids=None,
):
    """`elsewhere` with two clients on each."""

    def place(work):
        paths = {}
        for n in range(1, 5):
            node = Node(side_of(work), [2 * n - 2, 2 * n - 1], folder / str(n), for_secagg_plus=True)
            paths[n] = str(folder / f"channel{n}")
            channel.serve(paths[n], node.answer)
        grid = NearbyGrid(paths, lost, tamper)
        link = GridLink(grid)
        if grids is not None:
            grids.append(grid)
        secure = secagg_plus(link, clip=1.0, bits=24)
        return on_nodes(link, SETTINGS, has_base=False, timeout_s=0.3, wait_s=1, secure=secure, say=say)(work)

    folder.mkdir()
    return place


def assert_same_params(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a.state.params, b.state.params)


def test_the_mean_is_the_simulators_without_a_node_that_left_before_masking(tmp_path):
    lost, grids = lambda round, stage, node: round == 2 and node == 3 and stage == "collect_masked_vectors", []
    there = run(tmp_path / "there", four_nodes(tmp_path / "nodes", lost=lost, grids=grids))
    assert there.history[1]["arrived"] == list(range(8)) and there.history[1]["silent"] == []
    assert there.history[2]["arrived"] == [0, 1, 2, 3, 6, 7] and there.history[2]["silent"] == [4, 5]
    losses = iter([[], [4, 5]])
    here = run(tmp_path / "here", lambda work: work._replace(schedule=Losing(work.schedule, losses)))
    assert_same_params(here, there)
    for kind in ("mean", "train"):  # asked for openly, as a server might
        request = Envelope({"kind": kind, "base": "", "run": "", "round": 0, "clients": {"0": {}}}, {"message": b""})
        answer = GridLink(grids[0]).exchange({1: request}, 5.0)[1]
        assert "masked" in answer.head["error"] and answer.blobs == {}


def test_who_left_after_masking_is_in_the_sum_and_who_left_before_sharing_voids_the_round(tmp_path):
    """The second is a limit of Flower's: nobody has a share of what must be rebuilt, or is asked for one he has not."""
    lines = []
    late = lambda round, stage, node: (round, stage, node) == (1, "unmask", 3)
    early = lambda round, stage, node: round == 2 and node == 3 and stage != ""
    lost = lambda *where: late(*where) or early(*where)
    there = run(tmp_path / "there", four_nodes(tmp_path / "nodes", lost=lost, say=lines.append))
    assert there.history[1]["arrived"] == list(range(8))
    assert there.history[2]["arrived"] == [] and there.history[2]["silent"] == [4, 5]
    assert any("round 2 is void: SecAgg+ stopped" in line for line in lines)
    assert_same_params(run(tmp_path / "here", num_rounds=1), there)


def test_a_server_that_calls_everybody_lost_and_there_gets_both_secrets_of_everybody(tmp_path):
    """A limit of Flower's that docs/results/flower.md names: nodes do not compare the two lists. This project's clients
    give one share of each (tests/fed/secure)."""

    def tamper(stage, configs):
        if stage == "unmask":
            configs["dead_nids"] = list(configs["active_nids"])

    grids, lines = [], []
    run(tmp_path / "run", four_nodes(tmp_path / "nodes", tamper=tamper, say=lines.append, grids=grids), num_rounds=1)
    assert grids[0].shares == [8, 8, 8, 8]
    assert any("round 1 is void: SecAgg+ failed" in line for line in lines)  # the workflow itself cannot use them


def test_flowers_masks_come_from_a_generator_of_32_bits():
    """What docs/results/flower.md says of it: the 32 bytes that two nodes agree on become the seed of a Mersenne
    twister by an exclusive or of their words, so 2^32 tries undo a mask."""
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    secret = np.random.default_rng(0).integers(0, 2**32, 8, np.uint32)
    guess = np.asarray([functools.reduce(np.bitwise_xor, secret)], np.uint32)
    masks = [pseudo_rand_gen(key.tobytes(), 2**32, [(100,)])[0] for key in (secret, guess)]
    np.testing.assert_array_equal(*masks)
