"""Perplexity and bits per byte of a model on a text."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fmfl_jax.data.batches import EvaluationWindows
from fmfl_jax.models.llama import Merge
from fmfl_jax.models.loss import token_nll
from fmfl_jax.models.tensor_parallel import CUT_FROZEN
from fmfl_jax.parallel import AXIS, process_devices, replicate
from fmfl_jax.progress import Progress


class Evaluation(NamedTuple):
    """ppl = exp(nats_per_token); bits_per_byte compares models with different tokenizers; tokens were predicted."""

    ppl: float
    bits_per_byte: float
    nats_per_token: float
    tokens: int


def make_evaluator(
    merge: Merge, data: EvaluationWindows, *, batch_size: int | None = None, mesh: Mesh | None = None
) -> Callable[[dict, dict], Evaluation]:
    """evaluate(trainable, frozen) -> Evaluation, over all devices, batch_size windows per device at a time; None: 8, or
    on a CPU about 1,024 tokens, beyond which it gets slower.

    trainable and frozen are replicated (see fmfl_jax/parallel.py). It is compiled once. mesh: the model is cut over its
    axis "model" (peft/tensor_parallel.py), the windows over "clients".
    """
    if batch_size is None:
        batch_size = 8 if jax.default_backend() != "cpu" else max(1, min(8, 1024 // (data.windows.shape[1] - 1)))

    def batch_nll(trainable, frozen, windows, mask):
        nll = token_nll(merge(trainable, frozen), windows)  # [B, T]
        return jax.lax.psum(jnp.sum(jnp.where(mask, nll, 0.0)), AXIS)

    if mesh is None:
        step = jax.pmap(batch_nll, axis_name=AXIS, in_axes=(None, None, 0, 0), out_axes=None)
    else:
        step = _over_mesh(batch_nll, mesh)
    devices = jax.device_count() if mesh is None else mesh.shape[AXIS]
    windows, mask = (_layout(x, devices, batch_size) for x in (data.windows, data.mask))  # [steps, devices, B, ...]
    tokens = int(data.mask.sum())

    def evaluate(trainable, frozen) -> Evaluation:
        # The sums of the batches are added in float64: a corpus has more tokens than float32 counts well.
        sums = [step(trainable, frozen, w, m) for w, m in zip(windows, mask)]
        progress = Progress(len(sums), label="evaluation", unit="step")
        nll = math.fsum(float(s) for s in progress.track(sums))
        nats = nll / tokens
        ppl = math.exp(nats) if nats < 700 else math.inf
        return Evaluation(ppl, nll / math.log(2) / data.num_bytes, nats, tokens)

    return evaluate


def _over_mesh(batch_nll, mesh: Mesh):
    """As the pmap of it over the axis of the clients, with frozen cut over that of the model."""
    everywhere, by_clients = PartitionSpec(), PartitionSpec(AXIS)

    def of_device(trainable, frozen, windows, mask):
        return batch_nll(trainable, frozen, windows[0], mask[0])

    in_specs = (everywhere, CUT_FROZEN, by_clients, by_clients)
    step = jax.jit(jax.shard_map(of_device, mesh=mesh, in_specs=in_specs, out_specs=everywhere, check_vma=False))
    # Parameters that the host made, or another mesh, may not stand beside those of this one.
    return lambda trainable, *rest: step(replicate(trainable, copy=False, mesh=mesh), *rest)


def _layout(x: np.ndarray, devices: int, batch_size: int) -> np.ndarray:
    """[W, ...] -> [steps, devices of this process, B, ...], filled up with zeros (which the mask leaves out)."""
    steps = -(-len(x) // (devices * batch_size))
    x = np.concatenate([x, np.zeros((steps * devices * batch_size - len(x), *x.shape[1:]), x.dtype)])
    return x.reshape(steps, devices, batch_size, *x.shape[1:])[:, process_devices()]
