"""Students without a federation: on the FM's labels, on a client's own rows, on all rows in one place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.data.classification import Rows, Task
from fmfl_jax.models.classifiers import Model
from fmfl_jax.services.teach import distillation_loss


@functools.partial(jax.jit, static_argnames="model")
def fit(model: Model, x, log_targets, weights, learning_rate, num_steps):
    """Params after num_steps of gradient descent on KL(target || student) over rows x [N, L].

    log_targets: [N, K] log-probabilities (labels: `log_labels`). weights: float32 [N], 0 for no row.
    """

    def loss(params):
        return distillation_loss(model.apply(params, x), log_targets, temperature=1.0, weights=weights).loss

    def step(_, params):
        return jax.tree.map(lambda w, g: w - learning_rate * g, params, jax.grad(loss)(params))

    return jax.lax.fori_loop(0, num_steps, step, model.init(jax.random.key(0)))


def log_labels(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """float32 [N, K]: log-probabilities of a certain label, the others at -20 nats."""
    return np.where(np.eye(num_classes, dtype=bool)[labels], np.float32(0), np.float32(-20))


@functools.partial(jax.jit, static_argnames="model")
def predicted(model: Model, params, x):
    """Logits [N, K]."""
    return model.apply(params, x)


@functools.partial(jax.jit, static_argnames="model")
def features(model: Model, params, x):
    """[N, D], what the last layer sees. Raises ValueError for a model without a layer before it."""
    if model.features is None:
        raise ValueError("this student has no layer before its last: student=hidden has")
    return model.features(params, x)


def probabilities(model: Model, params, x) -> np.ndarray:
    """float64 [N, K]."""
    logits = np.asarray(predicted(model, params, x), np.float64)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def accuracy(model: Model, params, rows: Rows) -> float:
    """On rows."""
    return float(np.mean(np.asarray(predicted(model, params, rows.x)).argmax(axis=1) == rows.y))


def class_accuracies(model: Model, params, rows: Rows, num_classes: int) -> np.ndarray:
    """float64 [K]: on the rows of each class; of a class without rows the accuracy on all."""
    hit = np.asarray(predicted(model, params, rows.x)).argmax(axis=1) == rows.y
    return np.asarray([hit[rows.y == c].mean() if np.any(rows.y == c) else hit.mean() for c in range(num_classes)])


def worst_client(class_accuracy: np.ndarray, histograms: np.ndarray) -> float:
    """The least accuracy of a client, whose test text has the labels' proportions of its own rows, int [C, K]."""
    return float((histograms / histograms.sum(axis=1, keepdims=True) @ class_accuracy).min())


def alone(model: Model, task: Task, num_classes: int, *, learning_rate: float, num_steps: int) -> np.ndarray:
    """float64 [C]: the test accuracy of each client's student that saw its own rows only."""
    parts = np.split(task.shards.rows, task.shards.starts[1:-1])
    most = max(map(len, parts))
    index, weights = np.zeros((len(parts), most), np.int32), np.zeros((len(parts), most), np.float32)
    for client, rows in enumerate(parts):
        index[client, : len(rows)], weights[client, : len(rows)] = rows, 1
    targets = log_labels(task.train.y, num_classes)
    one = lambda x, target, weight: fit(model, x, target, weight, learning_rate, num_steps)
    params = jax.vmap(one)(jnp.asarray(task.train.x)[index], jnp.asarray(targets)[index], weights)
    logits = jax.vmap(lambda own: predicted(model, own, task.test.x))(params)
    return (np.asarray(logits).argmax(axis=2) == task.test.y[None]).mean(axis=1)


def centralized(model: Model, task: Task, num_classes: int, *, learning_rate: float, num_steps: int):
    """Params of the student that sees all clients' rows."""
    x, targets = task.train.x, log_labels(task.train.y, num_classes)
    return fit(model, x, targets, np.ones(len(x), np.float32), learning_rate, num_steps)
