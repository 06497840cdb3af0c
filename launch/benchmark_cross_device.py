"""Small models: seconds of federated rounds, in turn with a PyTorch loop and Flower doing the same work; and a table of
the ways to run a device's clients.

  python -m launch.benchmark_cross_device --peer_script=FILE.py --peer_python=VENV/bin/python \\
      --flower_python=VENV/bin/python --train_text=dev.tsv --test_text=test.tsv

The peer's work: a linear classifier, 1,000 clients of 10 to 300 rows, 10 a round, one local epoch of SGD(.03) in
batches of 10, 100 rounds. The peer is a script with make_data() -> (clients [(x, y)], cohorts [R, 10]), which is asked
for its cohorts and the sums of its data, and with --engine=torch or flower and --rounds, printing one JSON line with
seconds and train_accuracy. Each engine runs --repeats times, in turn; ours includes making the cohorts, as the loop's
does, and none includes making the data or compiling. One JSON line per run, then one with the ratios of the medians and
of the best runs.

The table: seconds per round of every mode of fed/core/execution.py on a linear model, a CNN and (with --train_text) a
text classifier, in turn; over_best compares the default mode with the fastest.

On a machine where others work too, run it under `taskset -c 0`: one thread each, which waits for nobody.
"""

import json
import pathlib
import statistics
import subprocess
import time
from typing import NamedTuple

import jax
import numpy as np
import optax
from absl import flags

from fmfl_jax.data.batches import cohort as draw_cohort
from fmfl_jax.data.classification import Task, linear_task
from fmfl_jax.data.shards import epoch_batches, max_steps
from fmfl_jax.experiment.build.classification import make_task
from fmfl_jax.experiment.config.cross_device import CrossDeviceConfig, TaskConfig
from fmfl_jax.experiment.cross_device import mode_of
from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from fmfl_jax.fed.core.cohort import put_on_devices
from fmfl_jax.fed.core.execution import MODES, execution_of, pmap_round, stepwise_round
from fmfl_jax.fed.core.round import make_round
from fmfl_jax.fed.core.types import Cohort
from fmfl_jax.models.classifiers import Model, classification_loss, linear_classifier, make_evaluator
from fmfl_jax.parallel import replicate
from launch import app

_PEER_SCRIPT = flags.DEFINE_string("peer_script", None, "The peer.")
_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "Python of the peer's own environment, with PyTorch.")
_FLOWER_PYTHON = flags.DEFINE_string("flower_python", None, "Python of an environment with PyTorch and Flower.")
_TRAIN_TEXT = flags.DEFINE_string("train_text", None, "AG News, for the text classifier's row of the table.")
_TEST_TEXT = flags.DEFINE_string("test_text", None, "AG News, for the text classifier's row of the table.")
_ROUNDS = flags.DEFINE_integer("rounds", 100, "Rounds per run of the peer's task.", lower_bound=1, upper_bound=200)
_TABLE_ROUNDS = flags.DEFINE_integer("table_rounds", 5, "Rounds per run of the table.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Runs of each, in turn.", lower_bound=1)

_BATCH_SIZE, _PEER_LR = 10, 0.03


class Job(NamedTuple):
    """A model, its data on the device, and the cohorts int [R, C] that rounds train."""

    model: Model
    task: Task
    frozen: dict
    cohorts: np.ndarray
    learning_rate: float


def make_job(model: Model, task: Task, cohorts: np.ndarray, learning_rate: float) -> Job:
    """Puts the rows on the device."""
    return Job(model, task, replicate({"x": task.train.x, "y": task.train.y}, copy=False), cohorts, learning_rate)


def prepared(job: Job, mode: str):
    """run(seed) -> (seconds, parameters) of all rounds from the start, compiled; the seed orders the batches."""
    parts = make_round(
        fed_opt(classification_grad(job.model), optax.sgd(job.learning_rate)), execution=execution_of(mode)
    )
    run_round = stepwise_round(parts) if parts.execution.stepwise else pmap_round(parts)
    num_steps = max_steps(job.task.shards, batch_size=_BATCH_SIZE, epochs=1)
    params, sizes = job.model.init(jax.random.key(0)), job.task.shards.sizes.astype(np.float32)

    def rounds(cohorts, seed):
        state = jax.block_until_ready(replicate(parts.init(params, 0)))
        begin = time.perf_counter()
        for r, ids in enumerate(cohorts):
            batches, steps = epoch_batches(
                job.task.shards, ids, round=r, seed=seed, batch_size=_BATCH_SIZE, epochs=1, num_steps=num_steps
            )
            cohort = Cohort(ids.astype(np.int32), sizes[ids], batches, num_steps=steps)
            laid_out = put_on_devices(cohort, clients_per_pass=parts.execution.clients_per_pass)
            state, _, _ = run_round(state, job.frozen, laid_out)
        jax.block_until_ready(state)
        return time.perf_counter() - begin, state.params

    rounds(job.cohorts[:2], 0)
    return lambda seed: rounds(job.cohorts, seed)


def classification_grad(model: Model):
    """The gradient that a run takes."""
    return jax.value_and_grad(classification_loss(model))


def default_mode_of(job: Job) -> str:
    """What a run takes by itself."""
    config = CrossDeviceConfig(batch_size=_BATCH_SIZE)
    return mode_of(config, job.model, job.task, job.model.init(jax.random.key(0)))


def ask_peer(python: str, *arguments: str) -> dict:
    """The last JSON line that the peer prints."""
    done = subprocess.run([python, *arguments], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise ValueError(f"{python} {' '.join(arguments)[:200]} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(lines[-1])


def peer_cohorts(task: Task, script: pathlib.Path, python: str) -> np.ndarray:
    """int [R, 10], from the peer. Raises ValueError where its data are not ours."""
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import importlib, numpy as np\n"
        "clients, cohorts = importlib.import_module(sys.argv[2]).make_data()\n"
        "sums = [sum(float(x.sum(dtype='d')) for x, _ in clients), sum(int(y.sum()) for _, y in clients)]\n"
        "print(json.dumps({'cohorts': cohorts.tolist(), 'sizes': [len(y) for _, y in clients], 'sums': sums}))"
    )
    answer = ask_peer(python, "-c", code, str(script.parent), script.stem)
    ours = [float(task.train.x.sum(dtype="d")), int(task.train.y.sum())]
    if answer["sizes"] != task.shards.sizes.tolist() or not np.allclose(answer["sums"], ours, rtol=1e-9):
        raise ValueError(f"--peer_script={script} has other data than fmfl_jax.data.classification.linear_task")
    return np.asarray(answer["cohorts"])


def compare_with_peer() -> None:
    """The peer's task, all engines in turn."""
    task = linear_task(1000)
    script, peers = _PEER_SCRIPT.value or "", {}
    if not script:
        cohorts = np.stack([draw_cohort(1000, 10, round=r, seed=0) for r in range(_ROUNDS.value)])
    elif _PEER_PYTHON.value is None:
        raise ValueError("--peer_script needs --peer_python")
    else:
        cohorts = peer_cohorts(task, pathlib.Path(script), _PEER_PYTHON.value)[: _ROUNDS.value]
        peers = {"torch": _PEER_PYTHON.value}
        if _FLOWER_PYTHON.value is not None:
            peers["flower"] = _FLOWER_PYTHON.value
    job = make_job(linear_classifier(784, 10), task, cohorts, _PEER_LR)
    mode = default_mode_of(job)
    run, accuracy = prepared(job, mode), make_evaluator(job.model, *task.train)
    seconds = {engine: [] for engine in ("fmfl_jax", *peers)}
    for seed in range(_REPEATS.value):
        for engine, python in peers.items():
            answer = ask_peer(python, script, f"--engine={engine}", f"--rounds={_ROUNDS.value}")
            seconds[engine].append(answer["seconds"])
            app.say(json.dumps(answer))
        took, params = run(seed)
        seconds["fmfl_jax"].append(took)
        app.say(
            json.dumps(
                {
                    "engine": "fmfl_jax",
                    "execution": mode,
                    "rounds": len(cohorts),
                    "seconds": round(took, 4),
                    "train_accuracy": round(accuracy(params)["accuracy"], 4),
                }
            )
        )
    ratios = {}
    for name, of in (("median", statistics.median), ("best", min)):  # the best run is the one least disturbed
        ours = of(seconds["fmfl_jax"])
        ratios[name] = {"seconds": ours} | {f"over_{engine}": round(of(seconds[engine]) / ours, 1) for engine in peers}
    app.say(json.dumps(ratios))


def table_of_modes() -> None:
    """Seconds per round, all modes in turn."""
    kinds = {"linear": (TaskConfig(), 0.1), "images": (TaskConfig(name="images", num_clients=200), 0.05)}
    if _TRAIN_TEXT.value is not None:
        kinds["agnews"] = (TaskConfig(name="agnews", train_text=_TRAIN_TEXT.value, test_text=_TEST_TEXT.value), 0.3)
    for name, (config, learning_rate) in kinds.items():
        model, task = make_task(config)
        cohorts = np.stack([draw_cohort(config.num_clients, 10, round=r, seed=0) for r in range(_TABLE_ROUNDS.value)])
        job = make_job(model, task, cohorts, learning_rate)
        runs, seconds = {mode: prepared(job, mode) for mode in MODES}, {mode: [] for mode in MODES}
        for _ in range(_REPEATS.value):
            for mode, run in runs.items():
                seconds[mode].append(run(0)[0] / len(cohorts))
        medians = {mode: statistics.median(times) for mode, times in seconds.items()}
        default = default_mode_of(job)
        app.say(
            json.dumps(
                {
                    "model": name,
                    "round_s": {mode: round(s, 5) for mode, s in medians.items()},
                    "default": default,
                    "over_best": round(medians[default] / min(medians.values()), 3),
                }
            )
        )


def main():
    if (_PEER_SCRIPT.value is None) != (_PEER_PYTHON.value is None):
        raise ValueError("--peer_script and --peer_python go together")
    if _FLOWER_PYTHON.value is not None and _PEER_SCRIPT.value is None:
        raise ValueError("--flower_python needs --peer_script")
    compare_with_peer()
    table_of_modes()


if __name__ == "__main__":
    app.run(main)
