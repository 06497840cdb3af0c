"""Nodes whose clients have texts of their own, against the simulator with the same texts dealt to them."""

import dataclasses

import jax
import numpy as np
import pytest

from fmfl_jax.data.batches import token_windows
from fmfl_jax.data.tokenizers import byte_tokenizer
from fmfl_jax.deploy.client import Node
from fmfl_jax.deploy.job import OwnText, language_model_side, own_text_refusals
from fmfl_jax.deploy.server import on_nodes
from fmfl_jax.experiment.base import deal, prepare_base
from fmfl_jax.experiment.build.language_model import ClientData
from fmfl_jax.experiment.case_study import form_setup
from fmfl_jax.experiment.config.data import PartitionConfig, TextConfig
from fmfl_jax.experiment.config.federation import DpConfig, FederationConfig
from fmfl_jax.experiment.config.rounds import RoundsConfig
from fmfl_jax.experiment.loop.rounds import Callbacks, run_rounds
from fmfl_jax.experiment.methods.selections import Oort
from fmfl_jax.models.formats.checkpoint import save_checkpoint
from fmfl_jax.models.params import init_params
from fmfl_jax.parallel import replicate
from tests.deploy.links import SETTINGS, Direct
from tests.experiment.toys import MODEL, llama_settings

SEQ_LEN = 16
TEXTS = ("a text of the first node " * 4, "what only the second machine has, and more of it; " * 6)


@pytest.fixture(autouse=True)
def one_device(only_devices):
    only_devices(1)


@pytest.fixture
def config(tmp_path):
    """Three clients, of whom the last two are on the second node."""
    save_checkpoint(tmp_path / "base", MODEL, init_params(MODEL, jax.random.key(0)))
    (tmp_path / "public.txt").write_text("everybody knows this text " * 20)
    for number, text in enumerate(TEXTS):
        (tmp_path / f"own{number}.txt").write_text(text)
    public = str(tmp_path / "public.txt")
    return llama_settings(
        checkpoint=tmp_path / "base",
        tokenizer="bytes",
        model=None,
        text=TextConfig(seq_len=SEQ_LEN, train=public, eval=public),
        partition=PartitionConfig(num_clients=3),
        rounds=RoundsConfig(num_rounds=2, cohort_size=3, local_steps=2, batch_size=2, clients_per_pass=1),
    )


def rounds_with(config, data, directory, elsewhere=None):
    base = prepare_base(config, directory, lambda line: None)
    setup = form_setup(config, base, data(base), replicate(base.params, copy=False), "it")
    parts, view = setup.federation, setup.view
    work = (config.rounds, parts.round, view.trainable, view.frozen, setup.source, parts.schedule)
    callbacks = Callbacks(at_evaluation=(lambda seen: {"ppl": 1.0},))
    return run_rounds(*work, callbacks, directory=directory, elsewhere=elsewhere)


def test_nodes_with_texts_of_their_own_end_as_the_simulator_with_these_texts(config, tmp_path):
    first, second = (
        token_windows(byte_tokenizer(), [text], SEQ_LEN, add_bos=True, add_eos=True).windows for text in TEXTS
    )
    halves = np.array_split(np.random.default_rng(config.rounds.seed).permutation(len(second)), 2)
    indices = [np.arange(len(first)), *(len(first) + np.sort(half) for half in halves)]
    dealt = lambda base: ClientData(np.concatenate([first, second]), indices)
    here = rounds_with(config, dealt, tmp_path / "here")

    def place(work):
        nodes = {}
        for number, clients in enumerate(([0], [1, 2])):
            own = OwnText(str(tmp_path / f"own{number}.txt"), clients)
            side = language_model_side(config, SETTINGS, tmp_path, lambda line: None, own)
            nodes[number] = Node(side, clients, tmp_path / "nodes")
        link = Direct(nodes)
        return on_nodes(link, SETTINGS, has_base=True, timeout_s=5, wait_s=1, say=lambda line: None)(work)

    public = lambda base: ClientData(base.train.windows, deal(config.partition, base.train, seed=config.rounds.seed))
    there = rounds_with(config, public, tmp_path / "there", place)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), here.state.params, there.state.params)
    assert there.history[1]["loss"] == pytest.approx(here.history[1]["loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "text", "clients", "says"),
    [
        ("gone.txt", None, [0], "no such file"),
        ("short.txt", "too short", [0], "expected at least seq_len"),
        ("few.txt", "enough for a window or two of it", [0, 1, 2], "every client needs at least one"),
    ],
)
def test_a_text_that_is_not_there_or_too_short_is_refused(name, text, clients, says, config, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    own = OwnText(str(tmp_path / name), clients)
    with pytest.raises(ValueError, match=rf"^node_text=\S*{name}: .*{says}"):
        language_model_side(config, SETTINGS, tmp_path, lambda line: None, own)


def test_what_needs_to_know_everybodys_numbers_is_refused():
    dp_sgd = FederationConfig(privacy=("dp_sgd",), dp=DpConfig(noise_multiplier=1.0))
    secure = FederationConfig(privacy=("secure",))
    own = OwnText("mine.txt", [0])
    refused = (dp_sgd, "privacy=dp_sgd"), (secure, "weighting=uniform"), (FederationConfig(selection=Oort()), "oort")
    assert all(says in reason for fed, says in refused for reason in own_text_refusals(fed, own))
    assert [len(list(own_text_refusals(fed, own))) for fed, _ in refused] == [1, 1, 1]
    assert list(own_text_refusals(dataclasses.replace(secure, weighting="uniform"), own)) == []
