"""Streams text from a model.

python -m launch.generate --checkpoint=DIR --prompt="Once upon a time" --max_new_tokens=200 --temperature=0
python -m launch.generate --checkpoint=smollm2-135m --chat --prompt="What is a tensor?"
"""

import dataclasses

import jax
from absl import flags

from fmfl_jax.config import LlamaConfig
from fmfl_jax.data.tokenizers import Tokenizer, stream_decode
from fmfl_jax.models.generate import NO_TOKEN, Sampling, generate
from fmfl_jax.models.tensor_parallel import cut_config
from fmfl_jax.parallel import model_mesh
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.tensor_parallel import split_cut
from launch import app
from launch.flags import checkpoint as checkpoint_flags

_PROMPT = flags.DEFINE_string("prompt", "", "Text to go on from; empty: from the beginning of a document.")
_CHAT = flags.DEFINE_bool("chat", False, "Put --prompt as a user's message, in the checkpoint's own chat template.")
_SYSTEM = flags.DEFINE_string("system", None, "The system's message before it, with --chat.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 200, "Tokens to add at most.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 is greedy.", lower_bound=0)
_TOP_K = flags.DEFINE_integer("top_k", None, "Choose among the k likeliest tokens.", lower_bound=1)
_TOP_P = flags.DEFINE_float(
    "top_p",
    None,
    "Choose among the likeliest tokens that hold this probability together.",
    lower_bound=0,
    upper_bound=1,
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.", lower_bound=0)
_MODEL_PARALLEL = flags.DEFINE_integer(
    "model_parallel", 1, "Devices that the model's heads and hidden units are cut over.", lower_bound=1
)


def main():
    parts, mesh = _MODEL_PARALLEL.value, None
    if parts > 1:
        mesh = model_mesh(parts, num_devices=parts)
    config, model, tokenizer, peft, stop_tokens = checkpoint_flags.load_model(_check_parts)
    prompt = _prompt_ids(tokenizer)
    if mesh is not None:
        peft = dataclasses.replace(peft, dropout=0.0) if isinstance(peft, LoraConfig) else peft
        cut = split_cut(config, model.frozen, peft, mesh, key=jax.random.key(0))
        model = dataclasses.replace(cut, trainable=model.trainable)
    sampling = Sampling(
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        stop_tokens=stop_tokens,
        vocab_size=tokenizer.vocab_size,
    )
    chunks = generate(
        config,
        model.merge,
        model.trainable,
        model.frozen,
        [prompt],
        max_new_tokens=_MAX_NEW_TOKENS.value,
        sampling=sampling,
        key=jax.random.key(_SEED.value),
        mesh=mesh,
    )
    new_ids = (int(token) for chunk in chunks for token in chunk[0] if token != NO_TOKEN)
    print("" if _CHAT.value else _PROMPT.value, end="", flush=True)
    for text in stream_decode(tokenizer, new_ids, prompt):
        print(text, end="", flush=True)
    print()


def _check_parts(config: LlamaConfig, _) -> None:
    cut_config(config, _MODEL_PARALLEL.value)


def _prompt_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids to go on from. A chat template writes bos itself."""
    if _CHAT.value:
        if tokenizer.chat_template is None:
            raise ValueError(f"--chat: {tokenizer.name} has no chat template")
        system = [] if _SYSTEM.value is None else [{"role": "system", "content": _SYSTEM.value}]
        messages = [*system, {"role": "user", "content": _PROMPT.value}]
        return tokenizer.encode(tokenizer.chat_template.render(messages)).tolist()
    if _SYSTEM.value is not None:
        raise ValueError("--system needs --chat")
    ids = tokenizer.opening + (tokenizer.encode(_PROMPT.value).tolist() if _PROMPT.value else [])
    if not ids:
        raise ValueError("--prompt is empty and the checkpoint puts no token at the beginning of a text (see --bos)")
    return ids


if __name__ == "__main__":
    app.run(main, checkpoint_flags)
