"""Answers for many clients in one batch, each with a personal adapter over one base model.

  python -m launch.federated --personalization=private_lora:4 --out=runs/own ...
  python -m launch.serve --checkpoint=runs/own/base --tokenizer=bytes --personal_dir=runs/own/setups/lora-fp/personal \\
      --clients=0,3,7 --prompt="The import statement"
  python -m launch.serve --checkpoint=smollm2-135m --head=int8 --requests=trace.jsonl --alone

The first prints a line for each client, then the time per token of the batch beside that of the clients one by one.

The second serves a trace of requests as they arrive, with continuous batching and with static batching (or what
--batching says), on the base model or with each client's adapter of --personal_dir. It prints throughput and latencies,
and beside them what the simulator predicts from the time of a step and of a chunk of a prompt, measured before.
"""

import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
from absl import flags

from fmfl_jax.models.generate import Sampling
from fmfl_jax.models.serve import kept_tokens, make_server
from fmfl_jax.peft.export import load_peft
from fmfl_jax.services.scheduling.trace import read_trace
from launch import app, serve_requests
from launch.flags import checkpoint as checkpoint_flags

_PERSONAL = flags.DEFINE_string("personal_dir", None, "Folder with a PEFT adapter for each client, by number.")
_CLIENTS = flags.DEFINE_list("clients", ["0"], "Clients to answer.")
_PROMPT = flags.DEFINE_string("prompt", "", "Text to go on from; empty: from the beginning of a document.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 32, "Tokens to add at most.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each way, in turn.", lower_bound=1)


def main():
    if serve_requests.REQUESTS.value is not None:
        return _serve_trace(serve_requests.REQUESTS.value)
    if _PERSONAL.value is None:
        raise ValueError("--personal_dir names the folder of the clients' adapters, --requests a trace: see --help")
    config, base, tokenizer, _, stop_tokens = checkpoint_flags.load_model()
    split, adapters = _load_adapters(_PERSONAL.value, _CLIENTS.value, config, base)
    prompt = tokenizer.opening + (tokenizer.encode(_PROMPT.value).tolist() if _PROMPT.value else [])
    if not prompt:
        raise ValueError("--prompt is empty and the checkpoint puts no token at the beginning of a text (see --bos)")
    serve = make_server(
        config,
        split.merge,
        max_prompt_tokens=len(prompt),
        max_new_tokens=_MAX_NEW_TOKENS.value,
        sampling=Sampling(stop_tokens=stop_tokens, vocab_size=tokenizer.vocab_size),
    )
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    together, alone = stack(adapters), [stack([adapter]) for adapter in adapters]
    key = jax.random.key(0)

    def batched():
        return jax.block_until_ready(serve(together, split.frozen, [prompt] * len(adapters), key))

    def one_by_one():
        return [jax.block_until_ready(serve(adapter, split.frozen, [prompt], key))[0] for adapter in alone]

    rows, seconds = batched(), {batched: [], one_by_one: []}
    one_by_one()  # both are compiled before they are timed
    for _ in range(_REPEATS.value):
        for way, took in seconds.items():
            begin = time.perf_counter()
            way()
            took.append(time.perf_counter() - begin)
    for client, row in zip(_CLIENTS.value, rows):
        text = tokenizer.decode(kept_tokens(row))
        app.say(f"client {client}: {_PROMPT.value}{text}")
    tokens = len(adapters) * _MAX_NEW_TOKENS.value
    per_token = {way: 1e3 * statistics.median(took) / tokens for way, took in seconds.items()}
    app.say(
        f"{len(adapters)} clients: {per_token[batched]:.3f} ms per token in one batch, {per_token[one_by_one]:.3f} "
        f"one by one ({per_token[one_by_one] / per_token[batched]:.2f}x)"
    )


def _serve_trace(path: str):
    """--requests: with the adapters of the trace's clients where there is a folder of them."""
    trace = read_trace(path)
    config, base, tokenizer, _, stop_tokens = checkpoint_flags.load_model()
    if _PERSONAL.value is None:
        return serve_requests.serve(trace, config, base, tokenizer, stop_tokens, [base.trainable] * len(trace))
    clients = sorted({request.client or "" for request in trace})
    split, adapters = _load_adapters(_PERSONAL.value, clients, config, base)
    by_client = dict(zip(clients, adapters))
    serve_requests.serve(
        trace, config, split, tokenizer, stop_tokens, [by_client[request.client or ""] for request in trace]
    )


def _load_adapters(personal_dir, clients, config, base):
    """The base with places for the clients' adapters, and the adapters, by client. Raises ValueError for a client that
    has none, and for no clients."""
    folder, split, adapters = pathlib.Path(personal_dir), None, []
    for client in clients:
        if not client.isdecimal() or not (folder / client).is_dir():
            raise ValueError(
                f"{folder} has no adapter of client {client!r}: --clients, or a request's client, names one"
            )
        peft, tuned = load_peft(folder / client, config)
        if split is None:
            split = checkpoint_flags.split_with(config, base.frozen, peft)
        adapters.append(tuned)
    if split is None:
        raise ValueError("--clients names nobody")
    return split, adapters


if __name__ == "__main__":
    app.run(main, checkpoint_flags, serve_requests)
