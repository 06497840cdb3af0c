"""A foundation model labels texts by a prompt: accuracy and calibration of raw and calibrated scores.

python -m launch.fm_score --checkpoint=smollm2-135m                                  # the built-in task
python -m launch.fm_score --checkpoint=smollm2-135m --task=agnews --test=FILE.tsv --labelled=FILE.tsv \\
    --template=section --calibration=all --cache=scores.sqlite
"""

import json
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import flags

from fmfl_jax import streams
from fmfl_jax.data.classification import LabelledText
from fmfl_jax.data.topics import topic_texts
from fmfl_jax.models.batch_generate import make_text_generator
from fmfl_jax.models.generate import Sampling
from fmfl_jax.models.scoring import make_engine
from fmfl_jax.services import calibration, prompts
from fmfl_jax.services.cache import ScoreCache, cached
from fmfl_jax.services.confidence import expected_calibration_error
from fmfl_jax.services.types import ScoreFn
from launch import app
from launch.flags import checkpoint as checkpoint_flags
from launch.flags import labelled as labelled_flags
from launch.foundation import ROOM, best_template, model_name, token_limit, writing_prompt

_WRITTEN_TOKENS = 30
_METHODS = ("raw", "contextual", "batch", "temperature")
_TEST = flags.DEFINE_string("test", None, "Labelled texts to score: .tsv (text<TAB>label) or .jsonl.")
_LABELLED = flags.DEFINE_string("labelled", None, "Public labelled texts, for the temperature and --template=auto.")
_NUM_EXAMPLES = flags.DEFINE_integer("num_examples", 200, "Texts of --test, drawn at random by --seed.", lower_bound=1)
_NUM_LABELLED = flags.DEFINE_integer("num_labelled", 100, "Texts of --labelled, drawn likewise.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws of texts.", lower_bound=0)
_SHOTS = flags.DEFINE_integer("shots", 0, "Examples of the task in the prompt.", lower_bound=0)
_CALIBRATION = flags.DEFINE_multi_enum("calibration", ["all"], ["all", *_METHODS], "Rows of the table.")
_WORDS = flags.DEFINE_enum("words", "whole", ["whole", "first"], "Score whole label words, or their first tokens.")
_MAX_PROMPT_TOKENS = flags.DEFINE_integer("max_prompt_tokens", None, "Longer texts are cut.", lower_bound=1)
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 1024, "Tokens at a time; 16384 on an accelerator.", lower_bound=1)
_NUM_BINS = flags.DEFINE_integer("num_bins", 10, "Bins of the calibration error.", lower_bound=1)
_CACHE = flags.DEFINE_string("cache", None, "File of scores; a second run does not ask the model again.")
_ALONE = flags.DEFINE_integer(
    "one_at_a_time",
    0,
    "Also score, and write, this many texts one by one, and compare the speed (without the cache).",
    lower_bound=0,
)


class _Prompting(NamedTuple):
    """What turns a text into a prompt."""

    examples: Sequence[prompts.Example]
    chat: prompts.Chat | None
    limit: prompts.TokenLimit


def main():
    task, template = labelled_flags.task_from_flags()
    test, labelled = _texts(task)
    if template is None and labelled is None:
        raise ValueError("--template=auto needs --labelled=FILE")
    model = checkpoint_flags.load_model()
    split, tokenizer = model.split, model.tokenizer
    whole = _WORDS.value == "whole"
    parts = (model.config, split.merge, split.trainable, split.frozen, tokenizer)
    engine = make_engine(*parts, whole_words=whole, batch_tokens=_BATCH_TOKENS.value)
    if _SHOTS.value > len(task.examples):
        raise ValueError(f"--shots={_SHOTS.value}: task {task.name} has {len(task.examples)} examples")
    chat = None if tokenizer.chat_template is None else tokenizer.chat_template.render
    most = min(_MAX_PROMPT_TOKENS.value or model.config.max_seq_len, model.config.max_seq_len - ROOM)
    prompting = _Prompting(task.examples[: _SHOTS.value], chat, token_limit(tokenizer, most))
    if _CACHE.value is None:
        template = _report(task, template, test, labelled, engine.score, prompting)
    else:
        with ScoreCache(_CACHE.value) as cache:
            score = cached(engine.score, cache, model=model_name(model.config.dtype, _WORDS.value))
            template = _report(task, template, test, labelled, score, prompting)
            app.say(f"cache {cache.path}: {cache.hits} scores were there, {cache.misses} were asked for")
    if _ALONE.value:
        batch, _ = prompts.render_all(template, test.texts, **prompting._asdict())
        app.say(json.dumps(_compare(parts, whole, batch[: _ALONE.value], template.continuations)))
        prompt = writing_prompt(task, template, 0)
        app.say(json.dumps(_compare_writing(parts, prompt, _ALONE.value, model.stop_tokens)))


def _texts(task: prompts.TaskPrompts) -> tuple[LabelledText, LabelledText | None]:
    """Texts to score, and public labelled ones where there are some."""
    found = labelled_flags.read_files(task, test=_TEST.value)
    if found is None:
        public, test = topic_texts(_NUM_LABELLED.value, _NUM_EXAMPLES.value, seed=_SEED.value)
        return test, public
    test = _some(found[0], _NUM_EXAMPLES.value)
    if _LABELLED.value is None:
        return test, None
    return test, _some(labelled_flags.read_labelled(_LABELLED.value, task), _NUM_LABELLED.value)


def _some(read: LabelledText, count: int) -> LabelledText:
    """Texts at random: files are often in some order."""
    rows = streams.host_rng(streams.SAMPLE, _SEED.value).permutation(len(read.texts))[:count]
    return LabelledText([read.texts[row] for row in rows], read.labels[rows])


def _report(
    task: prompts.TaskPrompts,
    template: prompts.Template | None,
    test: LabelledText,
    labelled: LabelledText | None,
    score: ScoreFn,
    prompting: _Prompting,
) -> prompts.Template:
    """Prints the table; returns the template, the best of the task's on the labelled texts where it is None."""
    if template is None:
        assert labelled is not None
        template = best_template(score, task, labelled, say=app.say, **prompting._asdict())
    start = time.perf_counter()
    texts, num_cut = prompts.render_all(template, test.texts, **prompting._asdict())
    if num_cut:
        app.say(f"{num_cut} texts were cut in the middle to {prompting.limit.max_tokens} tokens")
    scores = prompts.sum_words(score(texts, template.continuations), template)
    seconds = time.perf_counter() - start
    app.say(f"task {task.name}, template {template.name}, {_SHOTS.value} shots, {len(test.texts)} texts")
    app.say(f"{'':24}{'accuracy':>9}{'ECE':>7}{'nll':>7}   (ECE with {_NUM_BINS.value} bins)")
    for name, rows in _calibrated(template, scores, labelled, score, prompting).items():
        numbers = calibration.accuracy(rows, test.labels), _ece(rows, test.labels), calibration.nll(rows, test.labels)
        app.say(f"{name:24}{numbers[0]:9.3f}{numbers[1]:7.3f}{numbers[2]:7.3f}")
    app.say(f"{len(texts) / seconds:.2f} examples/s (with compilation, and what the cache gave)")
    return template


def _calibrated(template, scores, labelled: LabelledText | None, score: ScoreFn, prompting: _Prompting) -> dict:
    """{row of the table: log-probabilities [N, K]}."""
    methods = _METHODS if "all" in _CALIBRATION.value else _CALIBRATION.value
    ask = lambda texts: prompts.score_classes(score, template, texts, **prompting._asdict())
    rows = {}
    if "raw" in methods:
        rows["raw"] = calibration.raw(scores)
    if "contextual" in methods:
        rows["contextual"] = calibration.contextual(scores, ask(calibration.NULL_TEXTS))
    if "batch" in methods:
        rows["batch"] = calibration.batch(scores)
    if "temperature" in methods:
        if labelled is None:
            if "all" not in _CALIBRATION.value:
                raise ValueError("--calibration=temperature needs --labelled=FILE")
            return rows
        known = ask(labelled.texts)
        for name, fitted, given in (
            ("raw", known, scores),
            ("batch", calibration.batch(known), calibration.batch(scores)),
        ):
            temperature = calibration.fit_temperature(fitted, labelled.labels)
            rows[f"{name}, T = {temperature:.2f}"] = calibration.with_temperature(given, temperature)
    return rows


def _ece(rows: np.ndarray, labels: np.ndarray) -> float:
    """Of the most probable class. rows: log-probabilities [N, K]."""
    confidence = np.minimum(np.exp(rows.max(axis=1)), 1.0)
    return expected_calibration_error(confidence, rows.argmax(axis=1) == labels, num_bins=_NUM_BINS.value)


def _compare(parts, whole: bool, texts: list[str], words: list[str]) -> dict[str, float]:
    """Examples/s of the prompts together, one in a pass, and one prompt and word in a pass, which knows no beginning in
    common. In turn, twice; the better one counts. The programs are compiled before; CPU seconds stand beside, for a
    machine that others use too."""
    make = lambda: make_engine(*parts, whole_words=whole, batch_tokens=_BATCH_TOKENS.value).score

    def together(score: ScoreFn, words: list[str]):
        score(texts, words)

    def one_by_one(score: ScoreFn, words: list[str]):
        for text in texts:
            score([text], words)

    def word_by_word(score: ScoreFn, words: list[str]):
        for word in words:
            one_by_one(score, [word])

    ways = {"together": together, "one_text_a_pass": one_by_one, "one_text_and_word_a_pass": word_by_word}
    together(make(), words)
    one_by_one(make(), words)
    word_by_word(make(), words[:1])
    seconds = {name: [] for name in ways}
    for _ in range(2):
        for name, way in ways.items():
            start, cpu, score = time.perf_counter(), time.process_time(), make()
            way(score, words)
            seconds[name].append((time.perf_counter() - start, time.process_time() - cpu))
    out = {}
    for name, taken in seconds.items():
        wall, cpu = (min(column) for column in zip(*taken))
        out[f"{name}_examples_per_s"] = round(len(texts) / wall, 3)
        out[f"{name}_cpu_s_per_example"] = round(cpu / len(texts), 4)
    return out


def _compare_writing(parts, prompt: str, count: int, stop_tokens: tuple[int, ...]) -> dict[str, float]:
    """Texts/s of `count` texts that follow one prompt, together and one after another, compiled before."""
    sampling, out = Sampling(temperature=0.9, top_p=0.95, stop_tokens=stop_tokens), {}
    for name, rows in (("written_together", count), ("written_one_by_one", 1)):
        generate = make_text_generator(*parts, sampling=sampling, max_new_tokens=_WRITTEN_TOKENS, batch_rows=rows)
        generate([prompt] * rows, 0)
        taken = []
        for seed in (1, 2):
            start, cpu = time.perf_counter(), time.process_time()
            generate([prompt] * count, seed)
            taken.append((time.perf_counter() - start, time.process_time() - cpu))
        wall, cpu = (min(column) for column in zip(*taken))
        out[f"{name}_texts_per_s"] = round(count / wall, 3)
        out[f"{name}_cpu_s_per_text"] = round(cpu / count, 4)
    return out


if __name__ == "__main__":
    app.run(main, labelled_flags, checkpoint_flags)
