"""Tiny federations for the tests of the experiment: a vector, a small classifier, a small LLaMA."""

import json
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmfl_jax.config import llama_preset
from fmfl_jax.data.classification import linear_task
from fmfl_jax.experiment.build.federation import make_federation
from fmfl_jax.experiment.build.language_model import (
    ClientData,
    make_learner,
    make_source,
    view_of,
    window_batches,
)
from fmfl_jax.experiment.config.case_study import CaseStudyConfig, FineTuning
from fmfl_jax.experiment.config.data import PartitionConfig, TextConfig
from fmfl_jax.experiment.config.federation import FederationConfig
from fmfl_jax.experiment.config.pretrain import PretrainConfig
from fmfl_jax.experiment.config.rounds import RoundsConfig
from fmfl_jax.experiment.config.server import ServerConfig
from fmfl_jax.experiment.evaluation.per_client import hold_out, make_client_evaluator
from fmfl_jax.experiment.loop import rounds as round_loop
from fmfl_jax.experiment.loop.checkpointing import save_state
from fmfl_jax.experiment.loop.participation import CohortSchedule
from fmfl_jax.experiment.loop.rounds import Callbacks, Source, run_rounds
from fmfl_jax.experiment.network.rounds import NetworkJob
from fmfl_jax.fed import selection
from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from fmfl_jax.fed.core.round import Transport, make_round
from fmfl_jax.fed.core.types import Execution
from fmfl_jax.models.classifiers import linear_classifier
from fmfl_jax.models.params import init_params
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.split import split
from fmfl_jax.quant.awq import QuantConfig
from fmfl_jax.wireless import presets

TIMED = ("round_s", "tokens_per_s", "secure_protocol_s")


def timeless(history):
    """A history without what a clock measured."""
    return [{k: v for k, v in record.items() if k not in TIMED} for record in history]


def assert_finite(history):
    json.dumps(history, allow_nan=False)  # raises for NaN and infinity


def assert_same_run(a, b):
    """Two runs' states and histories, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, a.state, b.state)
    assert timeless(a.history) == timeless(b.history)


def whole_and_resumed(run, directory, step):
    """run(folder) -> a run, once to its end and once from what lay on disk after checkpoint `step`, as a process killed
    then leaves it."""
    whole, killed = directory / "whole", directory / "killed"

    def save_and_copy(checkpoints, at, state):
        save_state(checkpoints, at, state)
        if at == step:
            shutil.copytree(whole, killed)

    with mock.patch.object(round_loop, "save_state", save_and_copy):
        first = run(whole)
    assert [path.name for path in (killed / "checkpoints").iterdir()] == [str(step)]
    return first, run(killed)


# A vector: the windows' mean is its optimum.
CLIENTS = 8
SIZES = np.asarray([3, 7, 5, 15, 11, 9, 10, 4])


def toy_loss(params, frozen, windows, key):
    return jnp.mean(jnp.square(params["w"][None] - windows[:, :4].astype(jnp.float32)))


def toy_data():
    windows = np.random.default_rng(0).integers(0, 9, (64, 5)).astype(np.int32)
    return ClientData(windows, np.split(np.arange(64), np.cumsum(SIZES)[:-1]))


def toy_run(directory, num_rounds, job=None, codec=None, selector=None):
    """Rounds of the vector, over a network where there is a job."""
    config = RoundsConfig(num_rounds=num_rounds, cohort_size=6, local_steps=2, batch_size=2, checkpoint_every=2)
    data = toy_data()
    parts = make_round(
        fed_opt(jax.value_and_grad(toy_loss), optax.sgd(0.1), optax.sgd(1.0, momentum=0.5)),
        transport=Transport(codec=codec, substitute_lost=job is not None and job.aggregation == "last_delta"),
    )
    return run_rounds(
        config,
        parts,
        {"w": jnp.zeros(4, jnp.float32)},
        {"x": jnp.zeros(())},
        Source(sizes=data.sizes, batches=window_batches(config, data)),
        CohortSchedule(
            selector=selector or selection.uniform(6), sizes=np.float32(data.sizes), seed=config.seed, job=job
        ),
        Callbacks(at_evaluation=(lambda view: {"ppl": float(jnp.sum(view.state.params["w"]))},)),
        directory=directory,
    )


def make_toy_job(network, *, bits=2e4, aggregation="survivors", able=None, rings=False):
    count = network.num_clients
    return NetworkJob(
        network=network,
        compute_s=np.full(count, 1e-3, np.float32),
        compute_j=np.full(count, 1e-4, np.float32),
        able=np.ones(count, bool) if able is None else able,
        uplink_bits=int(bits),
        downlink_bits=int(bits),
        base_bits=int(50 * bits),
        aggregation=aggregation,
        rings=rings,
    )


def lossy(**overrides):
    """Chen's one-packet links with a block for everybody, and interference that far clients drown in now and then."""
    return presets.chen(
        **{"num_clients": CLIENTS, "tx_power_dbm": 17.0, "energy_limit_j": 1.0, "block_interference_w": (2e-7,) * 12}
        | overrides
    )


# A small classifier.
def small_task(num_clients=30):
    return linear_classifier(8, 10), linear_task(num_clients, num_features=8, num_test=400, seed=1)


# A small LLaMA.
MODEL = llama_preset("tiny", num_layers=2, embed_dim=16, hidden_dim=32, num_heads=2, num_kv_heads=1)


def llama_settings(federation=FederationConfig(), *, peft=LoraConfig(rank=4, targets=("q_proj",)), **more):
    """A case study of MODEL over nine clients of `llama_data`."""
    fields = dict(
        checkpoint=None,
        tokenizer=None,
        model=MODEL,
        dtype="float32",
        text=TextConfig(),
        pretrain=PretrainConfig(num_steps=1, batch_size=1, learning_rate=1e-3),
        partition=PartitionConfig(num_clients=9),
        quant=QuantConfig(group_size=16),
        weights=("fp",),
        rounds=llama_rounds(3),
        fine_tuning={"it": FineTuning(peft=peft, learning_rate=1e-2)},
        federation=federation,
        server=ServerConfig(),
    )
    return CaseStudyConfig(**fields | more)


def llama_rounds(num_rounds):
    return RoundsConfig(
        num_rounds=num_rounds, cohort_size=4, local_steps=2, batch_size=2, checkpoint_every=2, clients_per_pass=1
    )


def llama_data():
    rng = np.random.default_rng(0)
    indices = np.split(rng.permutation(60), [3, 8, 15, 20, 28, 36, 44, 50])
    return ClientData(rng.integers(0, 256, (60, 9)).astype(np.int32), indices)


def llama_run(config, directory, *, job=None, elsewhere=None):
    """The rounds of a `llama_settings`; the evaluation is a sum over the parameters."""
    (fine_tuning,) = config.fine_tuning.values()
    fed, rounds, data, held = config.federation, config.rounds, llama_data(), None
    if fed.keeps_personal_models:
        data, held = hold_out(data, 0.1, most=16, seed=rounds.seed)
    model = split(MODEL, init_params(MODEL, jax.random.key(0)), fine_tuning.peft, key=jax.random.key(1))
    view = view_of(fed, model, MODEL)
    federation = make_federation(
        fed,
        rounds,
        config.server,
        make_learner(view, fine_tuning, num_layers=MODEL.num_layers, remat=False),
        sizes=data.sizes,
        execution=Execution(clients_per_pass=rounds.clients_per_pass),
        job=job,
    )
    algorithm = federation.round.algorithm

    def evaluate(seen):
        shared = algorithm.shared(seen.state.params)
        return {"ppl": sum(float(np.abs(x).sum()) for x in shared.values())}

    own = () if held is None else (make_client_evaluator(view.evaluate, algorithm, held),)
    return run_rounds(
        rounds,
        federation.round,
        view.trainable,
        view.frozen,
        make_source(fed, rounds, data, MODEL.vocab_size, server_windows=llama_data().windows[:8]),
        federation.schedule,
        Callbacks(after_round=federation.after_round, at_evaluation=(evaluate, *own, *federation.at_evaluation)),
        directory=directory,
        elsewhere=elsewhere,
    )
