"""The foundation model of a command, from --checkpoint and its flags, as functions that label and write texts."""

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from fmfl_jax.data.classification import LabelledText
from fmfl_jax.data.tokenizers import Tokenizer
from fmfl_jax.experiment.loop.records import settings_of, write_json
from fmfl_jax.experiment.services.config import LoraTuning
from fmfl_jax.experiment.services.foundation import FoundationModel, Tune
from fmfl_jax.experiment.services.lora import Tuner, make_tuner
from fmfl_jax.models.batch_generate import make_text_generator
from fmfl_jax.models.formats.checkpoint import checkpoint_files
from fmfl_jax.models.generate import Sampling
from fmfl_jax.models.params import init_params
from fmfl_jax.models.scoring import make_engine
from fmfl_jax.services import prompts
from fmfl_jax.services.cache import ScoreCache, cached, checkpoint_hash
from fmfl_jax.services.placement import ModelSize, kv_bytes_per_token
from fmfl_jax.services.types import ScoreFn
from launch.flags import checkpoint as checkpoint_flags

_NEW_TOKENS, _TEMPERATURE = 30, 0.9  # of a written text
_ANSWER_TOKENS = 6  # of an answer in words
ROOM = 16  # tokens that the label words may take
_CHUNK = 64  # texts that are answered in words between two writes of the file


class OpenModel(NamedTuple):
    """The model of --checkpoint, ready to be asked. ask: its scores, through the cache; written: what it wrote, kept in
    a file beside the cache; chat, limit: of prompts; name: all that its answers depend on."""

    model: checkpoint_flags.LoadedModel
    ask: ScoreFn
    cache: ScoreCache
    written: "WrittenFile"
    chat: prompts.Chat | None
    limit: prompts.TokenLimit
    name: str


class WrittenFile:
    """Texts by a hash of what they were asked by, in a JSON file."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def texts(self, key: list, make: Callable[[], list[str]]) -> list[str]:
        """Those of the key, made and kept where they are not there."""
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        known = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        if digest not in known:
            known[digest] = make()
            write_json(self.path, known)
        return known[digest]


def open_model(cache: ScoreCache, *, batch_tokens: int) -> OpenModel:
    """Reads the model."""
    model = checkpoint_flags.load_model()
    config, split, tokenizer = model.config, model.split, model.tokenizer
    engine = make_engine(config, split.merge, split.trainable, split.frozen, tokenizer, batch_tokens=batch_tokens)
    chat = None if tokenizer.chat_template is None else tokenizer.chat_template.render
    limit = token_limit(tokenizer, config.max_seq_len - ROOM)
    name = model_name(config.dtype, "whole")
    written = WrittenFile(pathlib.Path(f"{cache.path}.written.json"))
    return OpenModel(model, cached(engine.score, cache, model=name), cache, written, chat, limit, name)


def best_template(
    score: ScoreFn, task: prompts.TaskPrompts, labelled: LabelledText, *, say: Callable[[str], None], **prompting
) -> prompts.Template:
    """The task's best template on a few labelled texts; says what each of them comes to."""
    results = prompts.choose_template(score, task, *labelled, **prompting)
    for r in results:
        say(
            f"template {r.template.name}: raw {r.raw_accuracy:.3f}, batch {r.batch_accuracy:.3f}, "
            f"nll {r.batch_nll:.3f} on {len(labelled.texts)} labelled texts"
        )
    return results[0].template


def best_template_in_words(
    opened: OpenModel,
    task: prompts.TaskPrompts,
    labelled: LabelledText,
    lora: LoraTuning,
    *,
    say: Callable[[str], None],
) -> prompts.Template:
    """The template whose answers in words name the right class most often; says what each of them comes to."""

    def right(template: prompts.Template) -> float:
        vote = foundation_model(opened, task, template, lora, access="text").vote
        assert vote is not None
        votes = vote(labelled.texts)
        share = float(np.mean(votes[np.arange(len(votes)), labelled.labels]))
        say(
            f"template {template.name}: a class named in {votes.sum():.0f} of {len(votes)} labelled texts, right in "
            f"{share:.3f} of all"
        )
        return share

    return max((t for t in task.templates if not t.chat or opened.chat is not None), key=right)


def foundation_model(
    opened: OpenModel,
    task: prompts.TaskPrompts,
    template: prompts.Template,
    lora: LoraTuning,
    *,
    access: str = "logits",
) -> FoundationModel:
    """The opened model, asked by this template. access "text": it says a class in words, as the task's examples before
    each prompt show it to, and no score leaves it. lora: how it is tuned where a service asks for that; tuned scores
    are kept in the cache, and the factors are found again only where one is missing."""
    chat, limit, name, split = opened.chat, opened.limit, opened.name, opened.model.split
    parts = (opened.model.config, split.merge, split.trainable, split.frozen, opened.model.tokenizer)
    examples = task.examples if access == "text" else ()

    def scorer(ask, limit=limit):
        return lambda texts: prompts.score_classes(ask, template, texts, chat=chat, limit=limit)

    def tokens(text):
        return len(limit.encode(prompts.render(template, text, examples=examples, chat=chat)))

    @functools.cache
    def generator(max_new_tokens: int, temperature: float):
        sampling = Sampling(temperature=temperature, top_p=0.95, stop_tokens=opened.model.stop_tokens)
        return make_text_generator(*parts, sampling=sampling, max_new_tokens=max_new_tokens)

    def write(label, count, seed):
        prompt = writing_prompt(task, template, label)

        def made():
            texts = generator(_NEW_TOKENS, _TEMPERATURE)([prompt] * count, seed * len(task.classes) + label)
            return [text.strip().split("\n")[0].strip() for text in texts]

        return opened.written.texts([name, prompt, count, seed, _NEW_TOKENS], made)

    def complete(openings, seed, max_new_tokens):
        key = [name, list(openings), seed, max_new_tokens, _TEMPERATURE]
        return opened.written.texts(key, lambda: generator(max_new_tokens, _TEMPERATURE)(openings, seed))

    def vote(texts):
        asked, _ = prompts.render_all(template, texts, examples=examples, chat=chat, limit=limit)
        said = []
        for start in range(0, len(asked), _CHUNK):
            some = asked[start : start + _CHUNK]
            key = [name, some, _ANSWER_TOKENS, 0]
            said += opened.written.texts(key, lambda some=some: generator(_ANSWER_TOKENS, 0.0)(some, 0))
        named = [prompts.named_class(template, answer) for answer in said]
        return np.asarray([[float(label == c) for c in range(len(task.classes))] for label in named])

    shown = f"{flags.FLAGS.checkpoint}, template {template.name}" + (", in words" if access == "text" else "")
    known = scorer(opened.ask) if access == "logits" else None
    fm = FoundationModel(shown, known, write, tokens, _size(opened), _NEW_TOKENS, vote, complete)

    @functools.cache
    def tuner():
        if flags.FLAGS.peft_dir is not None:
            raise ValueError("services=silos tunes a LoRA of its own: leave --peft_dir out")
        return make_tuner(opened.model.config, split.frozen, opened.model.tokenizer, template.continuations, lora)

    asked_by = lambda ask: fm._replace(score=scorer(ask, _tuned_limit(opened, lora)))
    return fm._replace(tune=_tune(opened, template, lora, tuner, asked_by))


def _tuned_limit(opened: OpenModel, lora: LoraTuning) -> prompts.TokenLimit:
    """Of the prompts that a tuned model sees, in tuning and after."""
    return opened.limit._replace(max_tokens=min(lora.max_tokens, opened.limit.max_tokens))


def _tune(
    opened: OpenModel,
    template: prompts.Template,
    lora: LoraTuning,
    tuner: Callable[[], Tuner],
    asked_by: Callable[[ScoreFn], FoundationModel],
    history: str = "",
    start: Callable[[], dict] | None = None,
) -> Tune:
    """FoundationModel.tune. tuner(): one for all, so that a step is compiled once. asked_by: the model with other
    scores; history: all that led to the factors start(), None for new ones."""

    def tune(texts, targets, offset, *, num_steps, seed):
        asked, _ = prompts.render_all(template, texts, chat=opened.chat, limit=_tuned_limit(opened, lora))
        goal, added = (np.round(np.asarray(values, np.float64), 6) for values in (targets, offset))
        settings = [history, opened.name, settings_of(lora), asked, template.continuations, goal.tolist()]
        settings.append(added.tolist())
        key = hashlib.sha256(json.dumps([*settings, num_steps, seed]).encode()).hexdigest()

        @functools.cache
        def factors():
            begin = None if start is None else start()
            return tuner().tune(asked, goal, added, num_steps=num_steps, seed=seed, start=begin)

        name = f"{opened.name} lora {key}"
        fm = asked_by(cached(lambda some, words: tuner().score(factors(), some), opened.cache, model=name))
        return fm._replace(name=f"{fm.name}, tuned", tune=_tune(opened, template, lora, tuner, asked_by, key, factors))

    return tune


def _size(opened: OpenModel) -> ModelSize:
    """For costs: parameters, the weights as they lie in memory, the cache."""
    config = opened.model.config
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype=config.dtype))
    value_bytes = jnp.dtype(config.dtype).itemsize
    return ModelSize(
        num_params=float(sum(leaf.size for leaf in jax.tree.leaves(abstract))),
        weight_bytes=float(sum(leaf.nbytes for leaf in jax.tree.leaves(opened.model.split.frozen))),
        kv_bytes_per_token=kv_bytes_per_token(config.num_layers, config.num_kv_heads, config.head_dim, value_bytes),
    )


def writing_prompt(task: prompts.TaskPrompts, template: prompts.Template, label: int) -> str:
    """What a text of a class is asked by: the class's first label word, and the task's examples of it."""
    examples = "".join(f"- {example.text}\n" for example in task.examples if example.label == label)
    return f"Short texts about {template.words[label][0]}:\n{examples}-"


def token_limit(tokenizer: Tokenizer, max_tokens: int) -> prompts.TokenLimit:
    """The most tokens of a prompt, counted as this tokenizer begins a text."""
    encode = lambda text: [*tokenizer.opening, *tokenizer.encode(text).tolist()]
    return prompts.TokenLimit(max_tokens, encode, tokenizer.decode)


def model_name(dtype: str, words: str) -> str:
    """All that scores depend on beside prompt and words. words: "whole" label words, or their "first" tokens."""
    found = flags.FLAGS
    others = [pathlib.Path(path) for path in (found.peft_dir, found.tokenizer) if path not in (None, "bytes")]
    settings = [str(found[name].value) for name in ("dequantize", "bos", "tokenizer")]
    return " ".join([checkpoint_hash([*checkpoint_files(found.checkpoint), *others]), dtype, words, *settings])
