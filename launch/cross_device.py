"""Small models on clients by the thousand: a linear classifier, a CNN or a text classifier, with unequal clients.

With no flags: a linear task made from the seed, no download. On AG News, dealt with skewed labels:
  python -m launch.cross_device --flagfile=launch/presets/agnews_fedadam.flags \\
      --train_text=FILE.tsv --test_text=FILE.tsv

With differential privacy of clients, of whom each takes part in a round by its own coin:
  python -m launch.cross_device --num_clients=10000 --cohort_size=500 --privacy=dp --dp_epsilon=4 --dp_clip=0.5

The same command with the same --out continues a run that was stopped.
"""

import pathlib

from absl import flags

from fmfl_jax.data.classification import Task
from fmfl_jax.experiment.build.classification import make_task
from fmfl_jax.experiment.config.client_counts import client_counts, described
from fmfl_jax.experiment.config.cross_device import TASKS, CrossDeviceConfig, TaskConfig
from fmfl_jax.experiment.cross_device import run_centralized, run_cross_device
from fmfl_jax.experiment.loop.divergence import divergence_text
from fmfl_jax.experiment.loop.records import claim, settings_of
from fmfl_jax.experiment.loop.rounds import Elsewhere
from fmfl_jax.experiment.loop.run_lock import run_lock
from fmfl_jax.experiment.report.contributions import contribution_line
from fmfl_jax.experiment.report.cross_device import write_report
from fmfl_jax.experiment.report.payments import payment_text, payments_line
from fmfl_jax.fed.core.execution import MODES
from fmfl_jax.models.classifiers import Model
from launch import app
from launch.flags import federation as federation_flags
from launch.flags import network as network_flags
from launch.flags.network import network_from_flags

_TASK = flags.DEFINE_enum("task", "linear", TASKS, "What the clients learn: linear and images are made from the seed.")
_TRAIN_TEXT = flags.DEFINE_string("train_text", None, "The clients' text for --task=agnews: lines of text<TAB>label.")
_TEST_TEXT = flags.DEFINE_string("test_text", None, "The text that accuracy is measured on.")
_NUM_CLIENTS = flags.DEFINE_integer("num_clients", 1000, "Clients that the rows are dealt to.", lower_bound=1)
_ALPHA = flags.DEFINE_float("alpha", 0.3, "Concentration of the Dirichlet distribution over labels (images, agnews).")
_COHORT = flags.DEFINE_integer("cohort_size", 50, "Clients drawn per round.", lower_bound=1)
_NUM_ROUNDS = flags.DEFINE_integer("num_rounds", 100, "Federated rounds.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 10, "Rows per local step; a client's last batch may be smaller.", lower_bound=1
)
_EPOCHS = flags.DEFINE_integer("local_epochs", 1, "Passes of a client over its rows per round.", lower_bound=1)
_CLIENT_LR = flags.DEFINE_float("client_lr", 0.1, "Learning rate of the clients' SGD.")
_EXECUTION = flags.DEFINE_enum(
    "execution",
    "auto",
    ["auto", *MODES],
    "How a device runs its clients: side by side, one after another in the compiled round, or "
    "step by step from Python. auto: vmap on accelerators; on CPUs scan, steps for "
    "convolutions.",
)
_CENTRALIZED = flags.DEFINE_integer(
    "centralized_epochs",
    0,
    "Also train the same model on all rows in one place, for so many epochs, to compare with.",
    lower_bound=0,
)
_CENTRALIZED_LR = flags.DEFINE_float("centralized_lr", None, "Learning rate of that training; default: --client_lr.")
_SEED = flags.DEFINE_integer("seed", 0, "Determines everything random.", lower_bound=0)
_EVAL_EVERY = flags.DEFINE_integer("eval_every", 10, "Rounds between evaluations.", lower_bound=1)
_CHECKPOINT_EVERY = flags.DEFINE_integer("checkpoint_every", 50, "Rounds between checkpoints.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "runs/cross_device", "Folder of the report and of the run's state.")


def line(record: dict) -> str:
    """One evaluated round."""
    loss = f", training loss {record['loss']:.4f}" if "loss" in record else ""
    epsilon = f", epsilon {record['epsilon']:.3f}" if "epsilon" in record else ""
    own = ""
    if "client_accuracy_mean" in record:
        own = (
            f", clients' own {record['client_accuracy_mean']:.4f} (worst decile "
            f"{record['client_accuracy_worst_decile']:.4f}; shared model there "
            f"{record['client_shared_accuracy_mean']:.4f})"
        )
    cost = f", {record['seconds']:.2f} s, {record['joules']:.3f} J" if "seconds" in record else ""
    reached = f"round {record['round']}: test accuracy {record['accuracy']:.4f}"
    return f"{reached}{own}{loss}{epsilon}{cost}{payment_text(record)}{divergence_text(record)}"


def configs_from_flags() -> tuple[TaskConfig, CrossDeviceConfig]:
    """The flags as checked configurations."""
    task_config = TaskConfig(
        name=_TASK.value,
        train_text=_TRAIN_TEXT.value,
        test_text=_TEST_TEXT.value,
        num_clients=_NUM_CLIENTS.value,
        alpha=_ALPHA.value,
        seed=_SEED.value,
    )
    config = CrossDeviceConfig(
        num_rounds=_NUM_ROUNDS.value,
        cohort_size=_COHORT.value,
        batch_size=_BATCH_SIZE.value,
        local_epochs=_EPOCHS.value,
        client_lr=_CLIENT_LR.value,
        federation=federation_flags.federation_from_flags(),
        server=federation_flags.server_from_flags(),
        network=network_from_flags(),
        execution=_EXECUTION.value,
        seed=_SEED.value,
        eval_every=_EVAL_EVERY.value,
        checkpoint_every=_CHECKPOINT_EVERY.value,
    )
    return task_config, config


def main(elsewhere: Elsewhere | None = None):
    task_config, config = configs_from_flags()
    model, task = make_task(task_config)  # before the folder is made: files that are no good leave nothing behind
    with run_lock(_OUT.value):
        run(task_config, config, model, task, pathlib.Path(_OUT.value), elsewhere)


def run(
    task_config: TaskConfig,
    config: CrossDeviceConfig,
    model: Model,
    task: Task,
    directory: pathlib.Path,
    elsewhere: Elsewhere | None = None,
) -> None:
    """Trains in `directory` and writes the report there. elsewhere: see `run_rounds`."""
    claim(
        directory,
        {
            "task": settings_of(task_config),
            "run": settings_of(config),
            "centralized": [_CENTRALIZED.value, _CENTRALIZED_LR.value],
        },
    )
    sizes = task.shards.sizes
    app.say(
        f"{len(sizes)} clients with {sizes.min()} to {sizes.max()} rows, {sizes.sum()} in all; "
        f"{len(task.test.y)} test rows"
    )
    counted = {"num_clients": len(sizes), "cohort_size": config.cohort_size}
    for text in described(client_counts(config.federation, **counted), config.federation, **counted):
        app.say(text)
    show = lambda record: app.say(line(record))
    result = run_cross_device(config, model, task, directory, say=app.say, on_evaluation=show, elsewhere=elsewhere)
    centralized = None
    if _CENTRALIZED.value:
        centralized = run_centralized(
            config,
            model,
            task,
            directory / "centralized",
            epochs=_CENTRALIZED.value,
            learning_rate=_CENTRALIZED_LR.value or config.client_lr,
            on_evaluation=lambda record: app.say("centralized, " + line(record)),
        )
    row = write_report(directory, config, task, result, centralized)
    if "total_paid_usd" in row:
        app.say(payments_line(row))
    if "contributions" in row:
        app.say(contribution_line(row["contributions"]))
    beside = "" if centralized is None else f", {row['centralized_accuracy']:.4f} with all rows in one place"
    app.say(f"{config.name} by {row['execution']}: test accuracy {row['accuracy']:.4f}{beside}")
    app.say(f"report: {directory}/row.json, accuracy.png, metrics.jsonl, config.json")


if __name__ == "__main__":
    app.run(main, federation_flags, network_flags)
