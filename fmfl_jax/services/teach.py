"""The foundation model as teacher of small models (section III-B): distillation, when to ask, who teaches whom.

    loss = T^2 KL(p_T || q_T),   p_T, q_T the softmax of teacher's and student's logits / T       (Hinton et al., 2015)

Of a top-k answer the rest of the mass is one more symbol, for the teacher and for the student alike: without it the
student would learn that everything else is impossible. A row of the teacher with a NaN or an infinity is left out: no
number of it reaches loss or gradient. FedMKT (Fan et al., COLING 2025) lets two models teach each other: for each
example the one with the lower loss on the answer is the target.

    >>> distilled = distillation_loss(student_logits, teacher_logits, temperature=4.0)
    >>> distilled.loss, distilled.weight      # 0 and 0 where the teacher knows no row

What runs inside a training step is JAX; what decides between steps is numpy.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.services.checks import at_least, distributions, positive, same_length


class Distilled(NamedTuple):
    """loss: float32 scalar, the weighted mean over the rows that the teacher knows; weight: the sum of their
    weights."""

    loss: jax.Array
    weight: jax.Array


class Mutual(NamedTuple):
    """bool [n] each: on which examples the first model learns from the second, and the second from the first. Never
    both; neither where the losses are equal or the better one is unknown."""

    first_learns: np.ndarray
    second_learns: np.ndarray


def known_rows(teacher) -> jax.Array:
    """bool [...]: rows of [..., K] whose every number is finite."""
    return jnp.all(jnp.isfinite(teacher), axis=-1)


def distillation_loss(student_logits, teacher_logits, *, temperature: float, weights=None) -> Distilled:
    """T^2 KL(p_T || q_T) over the last axis, mean over the rows that the teacher knows.

    student_logits, teacher_logits: [..., K] of one shape. weights: [...] of rows, None is 1 each. Raises ValueError for
    a temperature that is not above 0 and for unequal shapes.
    """
    positive(temperature=temperature)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student_logits {student_logits.shape} and teacher_logits {teacher_logits.shape} differ")
    known = known_rows(teacher_logits)
    safe = jnp.where(known[..., None], teacher_logits, jnp.zeros_like(teacher_logits))
    target = jax.nn.log_softmax(safe.astype(jnp.float32) / temperature)
    student = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    return _mean_divergence(target, student, known, temperature, weights)


def top_k_distillation_loss(student_logits, ids, log_masses, *, temperature: float, weights=None) -> Distilled:
    """The same for a teacher of which k symbols and the rest's mass are known; at most the loss of the full answer.

    Args:
      student_logits: [..., K].
      ids: int [..., k] with k < K, distinct in a row.
      log_masses: [..., k + 1], the log-probabilities of these symbols at this temperature and, last, of all others
        together (`logit_codecs.top_k_masses`).
    """
    positive(temperature=temperature)
    num_classes, k = student_logits.shape[-1], ids.shape[-1]
    if log_masses.shape != (*ids.shape[:-1], k + 1) or ids.shape[:-1] != student_logits.shape[:-1] or k >= num_classes:
        raise ValueError(
            f"expected ids [..., k] with k < {num_classes} and log_masses [..., k + 1], "
            f"got {ids.shape} and {log_masses.shape}"
        )
    known = known_rows(log_masses)
    target = jnp.where(known[..., None], log_masses, jnp.zeros_like(log_masses)).astype(jnp.float32)
    student = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    named = jnp.take_along_axis(student, ids, axis=-1)
    others = jnp.put_along_axis(student, ids, -jnp.inf, axis=-1, inplace=False)
    student = jnp.concatenate([named, jax.nn.logsumexp(others, axis=-1, keepdims=True)], axis=-1)
    return _mean_divergence(target, student, known, temperature, weights)


def feature_alignment(local_features, global_features, *, strength: float) -> jax.Array:
    """strength mean ||f_local(x) - f_global(x)||^2 on synthetic text (section III-A), a penalty of local training.

    local_features, global_features: [B, D]; no gradient reaches the global model, and a row that is not finite in it
    counts as aligned.
    """
    known = known_rows(global_features)[:, None]
    target = jax.lax.stop_gradient(jnp.where(known, global_features, jnp.zeros_like(global_features)))
    apart = jnp.where(known, local_features - target, jnp.zeros_like(local_features)).astype(jnp.float32)
    return strength * jnp.sum(jnp.square(apart)) / max(local_features.shape[0], 1)


def margins(probabilities) -> np.ndarray:
    """[n]: the best label's probability minus the second's, in [0, 1]; NaN where the row is. probabilities: [n, K]."""
    p = distributions("probabilities", probabilities)
    at_least(2, num_classes=p.shape[1])
    top = np.partition(p, p.shape[1] - 2, axis=1)
    return top[:, -1] - top[:, -2]


def ask_mask(unsureness, *, budget: int, least: float = 0.0) -> np.ndarray:
    """bool [n]: the examples to ask the teacher about, the `budget` most unsure of those with unsureness >= least.

    unsureness: [n], such as 1 - `margins` or `hallucination.label_entropy`. NaN, a student that says nothing, is the
    most unsure of all. The earlier of two alike is asked.
    """
    values = np.asarray(unsureness, np.float64)
    at_least(0, budget=budget)
    values = np.where(np.isnan(values), np.inf, values)
    asked = np.zeros(len(values), bool)
    asked[np.argsort(-values, kind="stable")[: int(budget)]] = True
    return asked & (values >= least)


def answer_losses(token_losses, targets, *, ignore: int = -100) -> np.ndarray:
    """[n] float64: an example's mean loss over the tokens of its answer; infinite where it has none or one is NaN.

    token_losses: [n, T]; targets: int [n, T], `ignore` at the prompt and the padding, which must not dilute the mean.
    """
    losses, targets = np.asarray(token_losses, np.float64), np.asarray(targets)
    if losses.shape != targets.shape or losses.ndim != 2:
        raise ValueError(f"token_losses {losses.shape} and targets {targets.shape} must be one [n, T]")
    counted = targets != ignore
    count = counted.sum(axis=1)
    mean = np.where(counted, losses, 0.0).sum(axis=1) / np.maximum(count, 1)
    return np.where((count > 0) & np.isfinite(mean), mean, np.inf)


def mutual_targets(first_losses, second_losses) -> Mutual:
    """FedMKT's selection: on each example the model with the higher loss learns from the one with the lower.

    first_losses, second_losses: [n] of one example each (`answer_losses`), compared as they are, in float64: through
    1 / exp(loss) in bf16 close losses would tie. NaN counts as infinite.
    """
    first, second = np.asarray(first_losses, np.float64), np.asarray(second_losses, np.float64)
    same_length(first_losses=first, second_losses=second)
    first, second = (np.where(np.isnan(x), np.inf, x) for x in (first, second))
    return Mutual(second < first, first < second)


def _mean_divergence(target, student, known, temperature: float, weights) -> Distilled:
    """target, student: log-probabilities [..., K]; known: bool [...]."""
    mass = jnp.exp(target)
    terms = jnp.where(mass > 0, mass * (target - student), jnp.zeros_like(target))
    rows = jnp.sum(terms, axis=-1)
    given = jnp.ones_like(rows) if weights is None else jnp.asarray(weights, jnp.float32)
    weight = jnp.where(known, given, jnp.zeros_like(given))
    total = jnp.sum(weight)
    # A row of weight 0 is left out before the product: 0 times infinity would be NaN.
    loss = jnp.sum(weight * jnp.where(weight > 0, rows, jnp.zeros_like(rows)))
    return Distilled(temperature**2 * loss / jnp.where(total > 0, total, jnp.ones_like(total)), total)
