"""Streams text from a model.

python -m launch.generate --checkpoint=DIR --prompt="Once upon a time" --max_new_tokens=200 --temperature=0
"""

import jax
from absl import flags

from fmfl_jax.data.tokenizers import stream_decode
from fmfl_jax.models.generate import NO_TOKEN, Sampling, generate
from launch import app, checkpoint_flags

_PROMPT = flags.DEFINE_string("prompt", "", "Text to go on from; empty: from the beginning of a document.")
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


def main():
    config, model, tokenizer, _, stop_tokens = checkpoint_flags.load_model()
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    text_ids = tokenizer.encode(_PROMPT.value).tolist() if _PROMPT.value else []
    if not bos + text_ids:
        raise ValueError("--prompt is empty and the tokenizer has no token that begins a document")
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
        [bos + text_ids],
        max_new_tokens=_MAX_NEW_TOKENS.value,
        sampling=sampling,
        key=jax.random.key(_SEED.value),
    )
    new_ids = (int(token) for chunk in chunks for token in chunk[0] if token != NO_TOKEN)
    print(_PROMPT.value, end="", flush=True)
    for text in stream_decode(tokenizer, new_ids, bos + text_ids):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    app.run(main, checkpoint_flags)
