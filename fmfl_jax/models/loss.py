"""Next-token cross-entropy of a Llama, without ever holding the logits of the whole batch."""

import functools

import jax
import jax.numpy as jnp

from fmfl_jax.models.llama import Llama, head_logits
from fmfl_jax.parallel import MODEL_AXIS
from fmfl_jax.quant.int4 import Int4Weight
from fmfl_jax.quant.int8 import Int8Weight
from fmfl_jax.quant.linear import product
from kernels.float32 import product as float32

CHUNK_TOKENS = 512  # rows of logits held at a time: enough for a full-speed product on every accelerator
# A CPU's cache should hold the logits between the passes over them, but a product wants rows: 512 were best with a
# vocabulary of 2,048, 128 with 49,152, 256 on a matrix unit, which splits the weight anew for every chunk
# (docs/results/rounds.md).
CPU_CHUNK_TOKENS, CPU_CHUNK_LOGITS = 128, 2**20


def token_nll(model: Llama, windows, *, dropout_key=None, remat=False):
    """float32 [B, T]: -log p(windows[b, t+1] | windows[b, :t+1]) in nats, of windows int32 [B, T+1].

    Differentiable in reverse mode only.
    """
    targets = windows[:, 1:]
    hidden = model.hidden(windows[:, :-1], dropout_key=dropout_key, remat=remat)  # [B, T, D]
    weight, tied = model.head()
    rows, cut = hidden.reshape(-1, hidden.shape[-1]), model.head_is_cut
    nll: jax.Array = cross_entropy(rows, weight, targets.reshape(-1), tied, cut)
    return nll.reshape(targets.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def cross_entropy(hidden, weight, targets, tied: bool, cut: bool = False) -> jax.Array:
    """float32 [M]: logsumexp(logits) - logits[targets], of hidden [M, D] and int32 targets [M].

    logits = head_logits(hidden, weight, tied), a chunk of rows at a time. The gradient of a token's loss with respect
    to its hidden state, (softmax - onehot) W^T, is taken while the logits are there; the backward pass scales it. That
    of the weight needs the cotangent first, so it makes the logits again; where the head is frozen nobody asks for it
    and the compiler drops the work.

    cut: weight is the part of the head that this device of the model axis has (models/tensor_parallel.py); the sums
    over the vocabulary go over the axis.
    """
    chunks = _chunks(_vocab_size(weight, tied), hidden, targets)
    return _unchunk(_over(lambda h, t: _chunk_nll(h, weight, t, tied, cut)[0], chunks), len(targets))


def _cross_entropy_forward(hidden, weight, targets, tied, cut):
    def chunk(h, t):
        nll, d_logits = _chunk_nll(h, weight, t, tied, cut)
        if tied:  # in h's dtype, as matmul's own derivative: a float32 product would convert the whole weight
            return nll, product(d_logits.astype(h.dtype), weight.astype(h.dtype))
        return nll, _pull_back(lambda h: head_logits(h, weight, tied), h, d_logits)

    nll, d_hidden = _over(chunk, _chunks(_vocab_size(weight, tied), hidden, targets))
    d_hidden = jax.lax.psum(d_hidden, MODEL_AXIS) if cut else d_hidden
    m = len(targets)
    return _unchunk(nll, m), (hidden, weight, targets, _unchunk(d_hidden, m))


def _cross_entropy_backward(tied, cut, residuals, d_nll):
    hidden, weight, targets, d_hidden = residuals
    d_hidden = (d_hidden.astype(jnp.float32) * d_nll[:, None]).astype(hidden.dtype)
    if isinstance(weight, Int4Weight | Int8Weight):
        return d_hidden, None, None

    def chunk(total, rows):
        h, t, d = rows
        d_logits = _chunk_nll(h, weight, t, tied, cut)[1] * d[:, None]
        return total + _pull_back(lambda w: head_logits(h, w, tied), weight, d_logits), None

    d_weight, _ = jax.lax.scan(
        chunk, jnp.zeros_like(weight), _chunks(_vocab_size(weight, tied), hidden, targets, d_nll)
    )
    return d_hidden, d_weight, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _chunk_nll(hidden, weight, targets, tied, cut):
    """The losses float32 [M] and their derivatives by the logits, softmax - onehot, float32 [M, V], or of this device's
    part of the vocabulary."""
    logits = head_logits(hidden, weight, tied)
    if cut:
        targets = targets - logits.shape[-1] * jax.lax.axis_index(MODEL_AXIS)
    onehot = targets[:, None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)[None]
    top = jnp.max(logits, axis=-1, keepdims=True)
    if cut:
        top = jax.lax.pmax(top, MODEL_AXIS)
    exp = jnp.exp(logits - top)
    total = jnp.sum(exp, axis=-1, keepdims=True)
    if cut:
        picked = jnp.sum(jnp.where(onehot, logits, 0.0), axis=-1, keepdims=True)
        total, picked = jax.lax.psum((total, picked), MODEL_AXIS)
    else:
        picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    nll = (jnp.log(total) + top - picked)[:, 0]
    return nll, exp / total - onehot.astype(jnp.float32)


def _pull_back(f, x, d_logits):
    return jax.vjp(f, x)[1](d_logits)[0]


def _vocab_size(weight, tied: bool) -> int:
    return weight.shape[0] if tied else weight.shape[-1]


def _chunks(vocab_size: int, *arrays):
    """Each [M, ...] as [chunks, rows, ...], filled up with zeros."""
    m, most = len(arrays[0]), CHUNK_TOKENS
    if jax.default_backend() == "cpu":
        least = 2 * CPU_CHUNK_TOKENS if float32.available() else CPU_CHUNK_TOKENS
        most = min(most, max(least, CPU_CHUNK_LOGITS // vocab_size))
    count = -(-m // most)
    rows = -(-m // count)

    def cut(x):
        x = jnp.pad(x, ((0, count * rows - m),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(count, rows, *x.shape[1:])

    return tuple(map(cut, arrays))


def _unchunk(x, m: int):
    return x.reshape(-1, *x.shape[2:])[:m]


def _over(f, chunks):
    """f over the leading axis, one at a time."""
    return jax.lax.map(lambda chunk: f(*chunk), chunks)
