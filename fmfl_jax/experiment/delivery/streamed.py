"""A forward pass that starts while the model is still arriving: layer l runs as soon as its tensors are there.

Files stand in the receiver's folder at their full length from the start, and what is before the first layer (headers,
configuration, tokenizer, embedding) arrives first, so the checkpoint can be opened then and read tensor by tensor.
"""

import pathlib
import threading
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fmfl_jax.data.tokenizers import model_tokenizer
from fmfl_jax.models.formats.checkpoint import open_checkpoint
from fmfl_jax.models.llama import abstract_llama, head_logits
from fmfl_jax.models.params import from_dict, to_dict
from fmfl_jax.models.rope import rope_frequencies, rope_tables
from fmfl_jax.transport.weights.manifest import Manifest, Part


class Arrivals:
    """When each stage was complete, s since the start; told by one thread (`on_part`), awaited by another.

    in_use: the files are read while they arrive, so `on_part` keeps the last part back, and with it the receiver from
    renaming their folder, until `release`.
    """

    def __init__(self, *, in_use: bool):
        self._start, self._changed = time.perf_counter(), threading.Condition()
        self._in_use, self._failed = in_use, False
        self._left: dict[int, int] | None = None
        self.seconds: dict[int, float] = {}

    def on_part(self, manifest: Manifest, part: Part) -> None:
        """One part is there."""
        with self._changed:
            if self._left is None:
                stages = [p.stage for p in manifest.parts]
                self._left = {stage: stages.count(stage) for stage in stages}
            self._left[part.stage] -= 1
            if not self._left[part.stage]:
                self.seconds[part.stage] = self.now()
            self._changed.notify_all()
            if not any(self._left.values()):
                self._changed.wait_for(lambda: not self._in_use)

    def release(self) -> None:
        """The files are not read any more."""
        with self._changed:
            self._in_use = False
            self._changed.notify_all()

    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def fail(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def wait(self, stage: int) -> None:
        """Returns when all parts of the stage are there. ConnectionError if they will not come."""
        with self._changed:
            there = lambda: self._left is not None and not self._left.get(stage, 0)
            self._changed.wait_for(lambda: self._failed or there())
            if not there():
                raise ConnectionError(f"stage {stage} of the model did not arrive")


class NextToken(NamedTuple):
    """text: of the most probable next token. begin_s: when layer 0 started, s since the arrivals' start. end_s: when
    the logits were there."""

    text: str
    begin_s: float
    end_s: float


def next_token(folder: pathlib.Path, prompt: str, arrivals: Arrivals) -> NextToken:
    """The most probable next token after `prompt`, by the checkpoint that is arriving in `folder`.

    Raises:
      ValueError: the files are no checkpoint.
      ConnectionError: something of it did not arrive.
    """
    arrivals.wait(0)
    path = next(iter(folder.glob("*.gguf")), folder)
    checkpoint = open_checkpoint(path)
    config, params = checkpoint.config, checkpoint.params
    tokenizer = model_tokenizer(checkpoint.tokenizer_path, vocab_size=config.vocab_size, model_name=str(path))
    tokens = np.asarray([tokenizer.opening + tokenizer.encode(prompt).tolist()], np.int32)
    if not tokens.size:
        raise ValueError("prompt is empty and the checkpoint puts no token at the beginning of a text")
    model = abstract_llama(config)
    graphdef, state = nnx.split(model.layers[0])
    names = list(to_dict(state))
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    rope = rope_tables(positions, rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling))

    @jax.jit
    def run(layer, h):
        return nnx.merge(graphdef, from_dict(state, layer))(h, rope, None, None, None)[0]

    embedding = params["embed_tokens.weight"]
    h = jnp.take(jnp.asarray(embedding), tokens, axis=0).astype(config.dtype)  # [1, T, D]
    begin_s = None
    for i in range(config.num_layers):
        arrivals.wait(1 + i)
        begin_s = arrivals.now() if begin_s is None else begin_s
        h = run({name: params[f"layers.{i}.{name}"] for name in names}, h)
    arrivals.wait(1 + config.num_layers)
    norm, norm_state = nnx.split(model.norm)
    h = nnx.merge(norm, from_dict(norm_state, {"weight": params["norm.weight"]}))(h[:, -1])
    head = embedding if config.tie_embeddings else params["lm_head.weight"]
    token = int(jnp.argmax(head_logits(h, head, config.tie_embeddings)[0]))
    return NextToken(tokenizer.decode([token]), begin_s or 0.0, arrivals.now())
