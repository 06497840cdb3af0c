"""A foundation model serves a federation of small text models: it labels, augments, teaches, weighs and evaluates.

With no flags: short notes on four topics made from the seed, answered by built-in keyword rules; no download, a minute:
  python -m launch.fm_services
With a model, on any labelled text (AG News here), FedAvg tuned first, controls beside:
  python -m launch.fm_services --task=agnews --train=FILE.tsv --test=FILE.tsv --checkpoint=smollm2-135m \\
      --placement=edge --services=distill,augment,evaluate --seeds=5 --out=DIR

The same command with the same --out goes on where it was stopped; the model is asked nothing twice.
"""

import contextlib
import importlib
import pathlib

import jax
from absl import flags

from fmfl_jax.data.topics import topic_texts
from fmfl_jax.experiment.loop.records import claim, settings_of
from fmfl_jax.experiment.loop.run_lock import run_lock
from fmfl_jax.experiment.services.config import ServicesConfig
from fmfl_jax.experiment.services.data import Corpus, public_labelled
from fmfl_jax.experiment.services.foundation import FoundationModel, in_words, keyword_rules
from fmfl_jax.experiment.services.report import write_report
from fmfl_jax.experiment.services.run import run_services
from fmfl_jax.services import prompts
from fmfl_jax.services.bias import Scorer
from fmfl_jax.services.cache import ScoreCache
from launch import app, foundation
from launch.flags import checkpoint as checkpoint_flags
from launch.flags import labelled as labelled_flags
from launch.flags import network as network_flags
from launch.flags import services as services_flags

NO_MODEL = "none"  # --checkpoint's default here

_TRAIN = flags.DEFINE_string("train", None, "Labelled texts of clients and pool: .tsv (text<TAB>label), .jsonl.")
_TEST = flags.DEFINE_string("test", None, "Labelled texts that accuracy is measured on.")
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 2048, "Tokens through the model at a time.", lower_bound=1)
_CACHE = flags.DEFINE_string("cache", None, "File of the model's answers; default: in --out.")
_SCORER = flags.DEFINE_string(
    "toxicity_scorer",
    None,
    "MODULE:FUNCTION of texts to numbers in [0, 1], for the service alignment, such as profanity_check:predict_prob of "
    "alt-profanity-check; without one toxicity is unknown.",
)
_OUT = flags.DEFINE_string("out", "runs/fm_services", "Folder of the report and of the run's state.")


def main():
    config = services_flags.config_from_flags()
    task, template = labelled_flags.task_from_flags()
    corpus = _corpus(task, config)
    if flags.FLAGS.checkpoint == NO_MODEL:
        _check_rules(task, template, config)
    scorer = _scorer()
    directory = pathlib.Path(_OUT.value)
    with run_lock(directory), contextlib.ExitStack() as stack:
        _keep_programs(directory)
        fm = _foundation(task, template, corpus, config, directory, stack)
        settings = {"run": settings_of(config), "data": [flags.FLAGS.task, _TRAIN.value, _TEST.value], "fm": fm.name}
        claim(directory, settings)
        app.say(f"answers by: {fm.name}")
        app.say(
            f"{config.data.num_clients} clients of {config.data.rows_per_client} rows, {config.cohort_size} a round, "
            f"{config.num_rounds} rounds, {config.data.num_pool} public texts, {config.seeds} seeds"
        )
        result = run_services(config, corpus, fm, directory, scorer=scorer, say=app.say)
        app.say("\n" + write_report(directory, result, config.target_accuracy, fm.name))
    more = ", risk_coverage.png, deferral.png" if result.trust is not None else ""
    app.say(f"\nreport: {directory}/table.md, rows.json, accuracy_rounds.png, _seconds, _joules, _bytes{more}")


def _check_rules(task: prompts.TaskPrompts, template: prompts.Template | None, config: ServicesConfig) -> None:
    """Raises ValueError where the built-in rules cannot serve."""
    if task.name != "topics":
        raise ValueError(f"--task={task.name} needs a --checkpoint: the built-in rules answer --task=topics only")
    if template is None:
        raise ValueError("--template=auto needs a --checkpoint: the built-in rules take no prompt")
    for name in ("generate", "silos"):
        if name in config.services:
            raise ValueError(
                f"--services={name} needs a --checkpoint: the built-in rules write nothing and learn nothing"
            )


def _foundation(
    task: prompts.TaskPrompts,
    template: prompts.Template | None,
    corpus: Corpus,
    config: ServicesConfig,
    directory: pathlib.Path,
    stack: contextlib.ExitStack,
) -> FoundationModel:
    if flags.FLAGS.checkpoint == NO_MODEL:
        rules = keyword_rules(task.classes)
        return rules if config.fm_access == "logits" else in_words(rules)
    cache = stack.enter_context(ScoreCache(_CACHE.value or directory / "scores.sqlite"))
    opened = foundation.open_model(cache, batch_tokens=_BATCH_TOKENS.value)
    if template is None:
        labelled = public_labelled(corpus, config.data, config.seed)
        if config.fm_access == "text":
            template = foundation.best_template_in_words(opened, task, labelled, config.lora, say=app.say)
        else:
            prompting = {"chat": opened.chat, "limit": opened.limit}
            template = foundation.best_template(opened.ask, task, labelled, say=app.say, **prompting)
    return foundation.foundation_model(opened, task, template, config.lora, access=config.fm_access)


def _scorer() -> Scorer | None:
    """--toxicity_scorer, imported before anything runs."""
    if _SCORER.value is None:
        return None
    module, _, name = _SCORER.value.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--toxicity_scorer={_SCORER.value}: expected MODULE:FUNCTION ({error})") from error


def _keep_programs(directory: pathlib.Path) -> None:
    """Compiled rounds are kept: seeds and controls run the same program."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(directory / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _corpus(task: prompts.TaskPrompts, config: ServicesConfig) -> Corpus:
    """The labelled texts. Raises ValueError for files that are missing or lack a class."""
    found = labelled_flags.read_files(task, train=_TRAIN.value, test=_TEST.value)
    if found is None:
        found = topic_texts(2 * config.data.num_train, config.data.num_test, seed=config.seed)
    train, test = found
    return Corpus(train, test, task.classes)


if __name__ == "__main__":
    flags.FLAGS.set_default("checkpoint", NO_MODEL)
    app.run(main, labelled_flags, services_flags, network_flags, checkpoint_flags)
