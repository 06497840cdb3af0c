"""The foundation model of a command, from --checkpoint and its flags, as functions that label and write texts."""

import hashlib
import json
import pathlib

import jax
from absl import flags

from fmfl_jax.data.tokenizers import Tokenizer
from fmfl_jax.experiment.services.foundation import FoundationModel
from fmfl_jax.models.batch_generate import make_text_generator
from fmfl_jax.models.formats.checkpoint import checkpoint_files
from fmfl_jax.models.generate import Sampling
from fmfl_jax.models.params import init_params
from fmfl_jax.models.scoring import make_engine
from fmfl_jax.services import prompts
from fmfl_jax.services.cache import ScoreCache, cached, checkpoint_hash
from fmfl_jax.services.placement import ModelSize, kv_bytes_per_token
from launch.flags import checkpoint as checkpoint_flags

_NEW_TOKENS = 30  # of a written text
ROOM = 16  # tokens that the label words may take
_VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def foundation_model(
    task: prompts.TaskPrompts, template: prompts.Template, cache: ScoreCache, *, batch_tokens: int = 2048
) -> FoundationModel:
    """The model of --checkpoint, asked by this template. What it said before is in `cache`, what it wrote in a file
    beside it."""
    model = checkpoint_flags.load_model()
    config, split, tokenizer = model.config, model.split, model.tokenizer
    parts = (config, split.merge, split.trainable, split.frozen, tokenizer)
    engine = make_engine(*parts, batch_tokens=batch_tokens)
    chat = None if tokenizer.chat_template is None else tokenizer.chat_template.render
    limit = token_limit(tokenizer, config.max_seq_len - ROOM)
    name = model_name(config.dtype, "whole")
    ask = cached(engine.score, cache, model=name)

    def score(texts):
        return prompts.score_classes(ask, template, texts, chat=chat, limit=limit)

    def tokens(text):
        return len(limit.encode(prompts.render(template, text, chat=chat)))

    sampling = Sampling(temperature=0.9, top_p=0.95, stop_tokens=model.stop_tokens)
    generate = make_text_generator(*parts, sampling=sampling, max_new_tokens=_NEW_TOKENS)
    memory = pathlib.Path(f"{cache.path}.written.json")

    def write(label, count, seed):
        prompt = writing_prompt(task, template, label)
        key = hashlib.sha256(json.dumps([name, prompt, count, seed, _NEW_TOKENS]).encode()).hexdigest()
        known = json.loads(memory.read_text(encoding="utf-8")) if memory.exists() else {}
        if key not in known:
            texts = generate([prompt] * count, seed * len(task.classes) + label)
            known[key] = [text.strip().split("\n")[0].strip() for text in texts]
            memory.write_text(json.dumps(known, ensure_ascii=False), encoding="utf-8")
        return known[key]

    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype=config.dtype))
    value_bytes = _VALUE_BYTES[config.dtype]
    size = ModelSize(
        num_params=float(sum(leaf.size for leaf in jax.tree.leaves(abstract))),
        weight_bytes=float(sum(leaf.nbytes for leaf in jax.tree.leaves(split.frozen))),
        kv_bytes_per_token=kv_bytes_per_token(config.num_layers, config.num_kv_heads, config.head_dim, value_bytes),
    )
    shown = f"{flags.FLAGS.checkpoint}, template {template.name}"
    return FoundationModel(shown, score, write, tokens, size, _NEW_TOKENS)


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
