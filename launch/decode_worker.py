"""Our row of `launch.benchmark_decode --checkpoint`, which starts it: a model in a process of its own (peers/turns.py).

python -m launch.decode_worker --checkpoint=smollm2-135m --head=int8 --activation_bits=16
"""

import jax
import jax.numpy as jnp
from absl import flags

from fmfl_jax.memory import return_freed_memory
from fmfl_jax.models.generate import DecodeState, Sampling, has_loop, init_cache, jit_generator
from fmfl_jax.models.params import num_bytes
from launch import app
from launch.flags import checkpoint as checkpoint_flags
from launch.peers.turns import round_figures, rss_bytes, take_turns, timed

_BATCH = flags.DEFINE_integer("batch", 1, "Batch size.", lower_bound=1)
_CONTEXT = flags.DEFINE_integer("context", 64, "Slots of the cache filled before the first step.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 64, "Steps a round.", lower_bound=1)
_PREFILL = flags.DEFINE_integer("prefill", 512, "Tokens of the prompt.", lower_bound=1)


def make_measure(config, model):
    """A function that measures one round: decoding and reading a prompt."""
    prefill_fn, decode_fn = jit_generator(model.merge, Sampling())
    one_array = has_loop(model.merge, model.trainable, model.frozen)
    batch, key = _BATCH.value, jax.random.key(0)
    prompt = jnp.tile(jnp.arange(_PREFILL.value, dtype=jnp.int32)[None] % config.vocab_size, (batch, 1))
    lengths = jnp.full(batch, _PREFILL.value, jnp.int32)
    start = jnp.full(batch, _CONTEXT.value, jnp.int32)
    empty = lambda: init_cache(config, batch, _PREFILL.value, one_array=one_array)
    arguments = model.trainable, model.frozen, prompt, lengths
    read_prompt = prefill_fn.lower(*arguments, jax.eval_shape(empty), key).compile()
    return_freed_memory()  # as `generate` does, before there is a cache

    def measure() -> dict[str, float]:
        cache = jax.block_until_ready(empty())
        read = timed(lambda: jax.block_until_ready(read_prompt(*arguments, cache, key).token))
        del cache
        return_freed_memory()
        cache = init_cache(config, batch, _CONTEXT.value + _TOKENS.value, one_array=one_array)
        state = DecodeState(cache, jnp.zeros_like(start), jnp.copy(start), jnp.zeros(batch, bool), jnp.copy(key))
        state = jax.block_until_ready(state)
        decode = lambda: jax.block_until_ready(decode_fn(model.trainable, model.frozen, state, _TOKENS.value))
        decoded = timed(decode)
        return_freed_memory()
        return round_figures(read, decoded, _TOKENS.value)

    return measure


def main():
    jax.block_until_ready(jnp.zeros(1))  # the backend's own memory is not the model's
    base, _ = rss_bytes()
    config, model, *_ = checkpoint_flags.load_model()
    about = {
        "package": f"fmfl_jax, jax {jax.__version__}",
        "device": jax.devices()[0].device_kind,
        "weight_bytes": num_bytes(model.frozen),
    }
    take_turns(about, base, make_measure(config, model))


if __name__ == "__main__":
    app.run(main, checkpoint_flags)
