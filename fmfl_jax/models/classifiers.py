"""Small classifiers for clients by the thousand, as plain (init, apply) pairs over {name: array}.

Anything of that form runs in the same rounds; these are the linear model, a two-layer CNN, and two of texts as hashed
n-grams: linear, and in the manner of fastText (Joulin et al., EACL 2017) with a hidden layer.
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Model(NamedTuple):
    """init(key) -> params, {name: float32 array}. apply(params, x [B, ...]) -> logits float32 [B, num_classes]. layers:
    the names of the parameters, layer by layer from the input. features(params, x) -> float32 [B, D], what the last
    layer, w and b, is applied to; None where there is no other layer."""

    init: Callable[[jax.Array], dict[str, jax.Array]]
    apply: Callable[[dict[str, jax.Array], jax.Array], jax.Array]
    layers: tuple[tuple[str, ...], ...]
    features: Callable[[dict[str, jax.Array], jax.Array], jax.Array] | None = None


def linear_classifier(num_features: int, num_classes: int) -> Model:
    """x float32 [B, num_features]; starts at zero."""

    def init(key):
        del key
        return {"w": jnp.zeros((num_features, num_classes)), "b": jnp.zeros(num_classes)}

    return Model(init, _dense, (("w", "b"),))


def small_cnn(image_size: int, num_classes: int, *, num_channels: int = 1, widths: tuple[int, int] = (16, 32)) -> Model:
    """x float32 [B, image_size, image_size, num_channels]: twice (3x3 convolution, ReLU, 2x2 maximum), then linear.

    Raises ValueError where 4 does not divide image_size.
    """
    if image_size % 4:
        raise ValueError(f"image_size is {image_size}: expected a multiple of 4")
    pixels = (image_size // 4) ** 2

    def init(key):
        keys, (first, second) = jax.random.split(key, 3), widths
        return {
            "conv1": _he(keys[0], (3, 3, num_channels, first)),
            "bias1": jnp.zeros(first),
            "conv2": _he(keys[1], (3, 3, first, second)),
            "bias2": jnp.zeros(second),
            "w": _he(keys[2], (pixels * second, num_classes)),
            "b": jnp.zeros(num_classes),
        }

    def apply(params, x):
        x = _conv_block(x, params["conv1"], params["bias1"])
        x = _conv_block(x, params["conv2"], params["bias2"])
        return _dense(params, x.reshape(x.shape[0], -1))

    return Model(init, apply, (("conv1", "bias1"), ("conv2", "bias2"), ("w", "b")))


def linear_text_classifier(num_buckets: int, num_classes: int) -> Model:
    """x int32 [B, L], numbers of hashed n-grams, 0 for no more: a linear model of their counts; starts at zero.

    Counts are divided by the square root of their number, so that a text of different words has norm 1.
    """

    def init(key):
        del key
        return {"w": jnp.zeros((num_buckets, num_classes)), "b": jnp.zeros(num_classes)}

    def apply(params, x):
        return _pooled(params["w"], x) + params["b"][None]

    return Model(init, apply, (("w", "b"),))


def text_classifier(num_buckets: int, num_classes: int, *, embed_dim: int = 32, hidden_dim: int = 32) -> Model:
    """x int32 [B, L], numbers of hashed n-grams, 0 for no more: their embeddings, a hidden layer, linear.

    The sum of the embeddings is divided by the square root of their number, which keeps the scale of one.
    """

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "embedding": jax.random.normal(keys[0], (num_buckets, embed_dim)) / jnp.float32(embed_dim),
            "hidden": _he(keys[1], (embed_dim, hidden_dim)),
            "hidden_bias": jnp.zeros(hidden_dim),
            "w": _he(keys[2], (hidden_dim, num_classes)),
            "b": jnp.zeros(num_classes),
        }

    def features(params, x):
        pooled = _pooled(params["embedding"], x)
        return jax.nn.relu(pooled @ params["hidden"] + params["hidden_bias"][None])

    def apply(params, x):
        return _dense(params, features(params, x))

    return Model(init, apply, (("embedding",), ("hidden", "hidden_bias"), ("w", "b")), features)


def classification_loss(
    model: Model,
) -> Callable[[dict, dict, dict, jax.Array], jax.Array]:
    """loss_fn(params, frozen, batch, key): mean cross-entropy over a batch of row numbers.

    frozen: {"x": [N, ...], "y": int32 [N], or float32 [N, K] of probabilities, times the row's weight}, the rows of
    all clients, on the device once.
    batch: {"index": int32 [B], "mask": bool [B]}; rows that the mask leaves out count nothing.
    """

    def loss(params, frozen, batch, key):
        del key
        x, y = (frozen[name].at[batch["index"]].get(mode="promise_in_bounds") for name in ("x", "y"))
        nll_of = optax.softmax_cross_entropy_with_integer_labels if y.ndim == 1 else optax.softmax_cross_entropy
        nll = nll_of(model.apply(params, x), y)
        count = jnp.maximum(jnp.sum(batch["mask"].astype(jnp.float32)), jnp.float32(1))
        return jnp.sum(jnp.where(batch["mask"], nll, jnp.float32(0))) / count

    return loss


def classification_sums(model: Model, params, x, y, mask):
    """float32 [2]: hits and nats over the rows x [B, ...], y int [B] that mask bool [B] leaves in."""
    logits = model.apply(params, x)
    hits = (jnp.argmax(logits, axis=-1) == y).astype(jnp.float32)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.stack([jnp.sum(jnp.where(mask, values, jnp.float32(0))) for values in (hits, nll)])


def make_evaluator(model: Model, x, y, *, batch_size: int = 1000) -> Callable[[dict], dict[str, float]]:
    """params -> {"accuracy", "nll"}, floats, over x [N, ...] and y int [N], which go to the device once.

    Raises ValueError where there are no rows.
    """
    if not len(y):
        raise ValueError("there are no rows to evaluate on")
    x, y = jax.device_put((x, y))

    @jax.jit
    def sums(params, x, y):
        logits = model.apply(params, x)
        hits = jnp.sum((jnp.argmax(logits, axis=-1) == y).astype(jnp.float32))
        return jnp.stack([hits, jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, y))])

    def evaluate(params):
        parts = [sums(params, x[i : i + batch_size], y[i : i + batch_size]) for i in range(0, len(y), batch_size)]
        hits, nll = (float(total) / len(y) for total in functools.reduce(operator.add, jax.device_get(parts)))
        return {"accuracy": hits, "nll": nll}

    return evaluate


def _dense(params, x):
    return x @ params["w"] + params["b"][None]


def _pooled(table, x):
    """table [V, D], x int32 [B, L], 0 for nothing -> [B, D]: the rows' sum over the square root of their number.

    The square root divides the weights, not the sum: that division's gradient comes out as NaN on CPUs under vmap over
    many rows (XLA of jaxlib 0.11.2 fuses the count with its broadcast to D, and leaves most of it unwritten).
    """
    real = (x > 0).astype(jnp.float32)  # [B, L]
    rows = table.at[x].get(mode="promise_in_bounds")  # [B, L, D]
    count = jnp.maximum(jnp.sum(real, axis=1, keepdims=True), jnp.float32(1))
    return jnp.einsum("bld,bl->bd", rows, real / jnp.sqrt(count))


def _conv_block(x, kernel, bias):
    """[B, H, W, in] -> [B, H/2, W/2, out]."""
    x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = jax.nn.relu(x + bias[None, None, None])
    b, h, w, c = x.shape
    return jnp.max(x.reshape(b, h // 2, 2, w // 2, 2, c), axis=(2, 4))  # its gradient is far cheaper than a window's


def _he(key, shape):
    """Normal with variance 2 / (inputs of a unit) (He et al., ICCV 2015)."""
    fan_in = 1
    for size in shape[:-1]:
        fan_in *= size
    return jax.random.normal(key, shape) * jnp.sqrt(jnp.float32(2 / fan_in))
