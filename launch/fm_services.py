"""A foundation model serves a federation of small text models: it labels, augments, teaches, weighs and evaluates.

With no flags: short notes on four topics made from the seed, answered by built-in keyword rules; no download, a minute:
  python -m launch.fm_services
With a model, on any labelled text (AG News here), FedAvg tuned first, controls beside:
  python -m launch.fm_services --task=agnews --train=FILE.tsv --test=FILE.tsv --checkpoint=smollm2-135m \\
      --placement=edge --services=distill,augment,evaluate --seeds=5 --out=DIR

The same command with the same --out goes on where it was stopped; the model is asked nothing twice.
"""

import contextlib
import pathlib

import jax
from absl import flags

from fmfl_jax.data.classification import read_labelled_text
from fmfl_jax.data.topics import topic_texts
from fmfl_jax.experiment.loop.records import claim, settings_of
from fmfl_jax.experiment.loop.run_lock import run_lock
from fmfl_jax.experiment.services.config import ServicesConfig
from fmfl_jax.experiment.services.data import Corpus
from fmfl_jax.experiment.services.foundation import FoundationModel, keyword_rules
from fmfl_jax.experiment.services.report import write_report
from fmfl_jax.experiment.services.run import run_services
from fmfl_jax.services import prompts
from fmfl_jax.services.cache import ScoreCache
from launch import app, foundation
from launch.flags import checkpoint as checkpoint_flags
from launch.flags import network as network_flags
from launch.flags import services as services_flags

NO_MODEL = "none"  # --checkpoint's default here

_TASK = flags.DEFINE_string("task", "topics", "topics (built in, with its texts), agnews, or a task's JSON file.")
_TRAIN = flags.DEFINE_string("train", None, "Labelled texts of clients and pool: .tsv (text<TAB>label), .jsonl.")
_TEST = flags.DEFINE_string("test", None, "Labelled texts that accuracy is measured on.")
_TEXT_COLUMN = flags.DEFINE_string("text_column", None, "The texts' column or field, where the files name columns.")
_LABEL_COLUMN = flags.DEFINE_string("label_column", None, "The labels' column or field.")
_TEMPLATE = flags.DEFINE_string("template", None, "A template of the task; default: its first.")
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 2048, "Tokens through the model at a time.", lower_bound=1)
_CACHE = flags.DEFINE_string("cache", None, "File of the model's answers; default: in --out.")
_OUT = flags.DEFINE_string("out", "runs/fm_services", "Folder of the report and of the run's state.")


def main():
    config = services_flags.config_from_flags()
    task = prompts.load_task(_TASK.value)
    template = task.templates[0] if _TEMPLATE.value is None else task.template(_TEMPLATE.value)
    corpus = _corpus(task, config)
    if flags.FLAGS.checkpoint == NO_MODEL and _TASK.value != "topics":
        raise ValueError(f"--task={_TASK.value} needs a --checkpoint: the built-in rules answer --task=topics only")
    directory = pathlib.Path(_OUT.value)
    with run_lock(directory), contextlib.ExitStack() as stack:
        _keep_programs(directory)
        fm = _foundation(task, template, directory, stack)
        settings = {"run": settings_of(config), "data": [_TASK.value, _TRAIN.value, _TEST.value], "fm": fm.name}
        claim(directory, settings)
        app.say(f"answers by: {fm.name}")
        app.say(
            f"{config.data.num_clients} clients of {config.data.rows_per_client} rows, {config.cohort_size} a round, "
            f"{config.num_rounds} rounds, {config.data.num_pool} public texts, {config.seeds} seeds"
        )
        result = run_services(config, corpus, fm, directory, say=app.say)
        app.say("\n" + write_report(directory, result, config.target_accuracy, fm.name))
    app.say(f"\nreport: {directory}/table.md, rows.json, accuracy_rounds.png, _seconds, _joules, _bytes")


def _foundation(
    task: prompts.TaskPrompts, template: prompts.Template, directory: pathlib.Path, stack: contextlib.ExitStack
) -> FoundationModel:
    if flags.FLAGS.checkpoint == NO_MODEL:
        return keyword_rules(task.classes)
    cache = stack.enter_context(ScoreCache(_CACHE.value or directory / "scores.sqlite"))
    return foundation.foundation_model(task, template, cache, batch_tokens=_BATCH_TOKENS.value)


def _keep_programs(directory: pathlib.Path) -> None:
    """Compiled rounds are kept: seeds and controls run the same program."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(directory / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _corpus(task: prompts.TaskPrompts, config: ServicesConfig) -> Corpus:
    """The labelled texts. Raises ValueError for files that are missing or lack a class."""
    if _TRAIN.value is None or _TEST.value is None:
        if _TASK.value != "topics" or _TRAIN.value is not None or _TEST.value is not None:
            raise ValueError(f"--task={_TASK.value} needs both --train=FILE and --test=FILE")
        train, test = topic_texts(2 * config.data.num_train, config.data.num_test, seed=config.seed)
        return Corpus(train, test, task.classes)
    columns = {"text_column": _TEXT_COLUMN.value, "label_column": _LABEL_COLUMN.value}
    train, test = (read_labelled_text(path, task.classes, **columns) for path in (_TRAIN.value, _TEST.value))
    prompts.check_labels(task, train.labels)
    return Corpus(train, test, task.classes)


if __name__ == "__main__":
    flags.FLAGS.set_default("checkpoint", NO_MODEL)
    app.run(main, services_flags, network_flags, checkpoint_flags)
