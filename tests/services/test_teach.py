"""Distillation: the golden, NaN that never reaches a student, the top-k loss, and FedMKT's selection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.services import teach
from fmfl_jax.services.logit_codecs import top_k_masses

distill = jax.jit(teach.distillation_loss, static_argnames="temperature")
distill_top_k = jax.jit(teach.top_k_distillation_loss, static_argnames="temperature")
gradient_of = jax.jit(jax.value_and_grad(lambda s, t: teach.distillation_loss(s, t, temperature=3.0).loss))
top_k_gradient_of = jax.jit(
    jax.value_and_grad(lambda s, ids, m: teach.top_k_distillation_loss(s, ids, m, temperature=3.0).loss)
)


def by_hand(student, teacher, temperature):
    p, q = (np.exp(x / temperature) / np.exp(x / temperature).sum() for x in (teacher, student))
    return temperature**2 * float(np.sum(p * np.log(p / q)))


def test_golden():
    found = distill(np.float32([[1, 2, 3]]), np.float32([[3, 1, 0]]), temperature=4.0)
    assert float(found.loss) == pytest.approx(2.154541, abs=1e-6) and float(found.weight) == 1


def test_weighted_mean_by_hand_and_zero_at_the_teacher():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, 4)).astype(np.float32)
    weights = np.asarray([1, 2, 0, 0.5, 1], np.float32)
    found = distill(student, teacher, temperature=2.0, weights=weights)
    rows = [by_hand(s.astype(float), t.astype(float), 2.0) for s, t in zip(student, teacher)]
    assert float(found.loss) == pytest.approx(np.average(rows, weights=weights), rel=1e-5)
    same = distill(teacher, teacher + 3, temperature=2.0, weights=weights)
    assert float(same.loss) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_teacher_row_reaches_neither_loss_nor_gradient(bad):
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 3, 4)).astype(np.float32)
    broken = teacher.copy()
    broken[1, 2] = bad
    value, gradient = gradient_of(student, broken)
    expected = [gradient_of(student[np.full(3, i)], teacher[np.full(3, i)]) for i in (0, 2)]
    assert float(value) == pytest.approx((float(expected[0][0]) + float(expected[1][0])) / 2, rel=1e-6)
    assert not np.asarray(gradient[1]).any()
    for row, (_, alone) in zip((0, 2), expected):
        np.testing.assert_allclose(gradient[row], np.asarray(alone).sum(axis=0) / 2, rtol=1e-5, atol=1e-7)
    nothing = gradient_of(student, np.full_like(teacher, bad))
    assert float(nothing[0]) == 0 and not np.asarray(nothing[1]).any()
    value, gradient = top_k_gradient_of(student, *top_k_masses(broken, k=2, temperature=3.0))
    assert np.isfinite(value) and np.isfinite(gradient).all() and not np.asarray(gradient[1]).any()


def test_the_top_k_loss_is_that_of_merged_symbols_and_no_more_than_the_full_one():
    rng = np.random.default_rng(2)
    student, teacher = (2 * rng.normal(size=(2, 6, 7))).astype(np.float32)
    losses = []
    full = float(distill(student, teacher, temperature=2.0).loss)
    for k in (1, 3, 6):
        ids, masses = top_k_masses(teacher, k=k, temperature=2.0)
        found = distill_top_k(student, ids, masses, temperature=2.0)
        losses.append(float(found.loss))
        rows = []
        for s, t in zip(student.astype(float), teacher.astype(float)):
            p, q = (np.exp(x / 2) / np.exp(x / 2).sum() for x in (t, s))
            top = np.argsort(-p)[:k]
            p, q = (np.append(x[top], 1 - x[top].sum()) for x in (p, q))
            rows.append(4 * np.sum(p * np.log(p / q)))
        assert losses[-1] == pytest.approx(np.mean(rows), rel=1e-4)
    assert all(a <= b + 1e-5 for a, b in zip(losses, [*losses[1:], full]))
    assert losses[-1] == pytest.approx(full, rel=1e-4)  # k = K - 1: the rest is the last symbol


def test_sharp_logits_stay_finite_in_loss_and_gradient():
    value, gradient = gradient_of(np.float32([[0, -5e4, 3e4, 0]] * 3), np.float32([[2e4, 0, -2e4, 0]] * 3))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_feature_alignment_pulls_the_local_model_only():
    local, other = jnp.asarray([[1.0, 2.0], [0.0, 1.0]]), jnp.asarray([[0.0, 2.0], [jnp.nan, 1.0]])
    penalty = jax.jit(jax.value_and_grad(lambda a, b: teach.feature_alignment(a, b, strength=0.5), argnums=(0, 1)))
    value, (mine, theirs) = penalty(local, other)
    assert float(value) == pytest.approx(0.25)
    np.testing.assert_allclose(mine, [[0.5, 0.0], [0.0, 0.0]])
    assert not np.asarray(theirs).any()


def test_asking_where_the_student_is_unsure():
    p = np.asarray([[0.9, 0.1, 0.0], [0.4, 0.35, 0.25], [0.5, 0.5, 0.0], [np.nan, 0.5, 0.5]])
    np.testing.assert_allclose(teach.margins(p), [0.8, 0.05, 0.0, np.nan], atol=1e-12)
    unsure = 1 - teach.margins(p)
    np.testing.assert_array_equal(teach.ask_mask(unsure, budget=2), [False, False, True, True])
    np.testing.assert_array_equal(teach.ask_mask(unsure, budget=9, least=0.9), [False, True, True, True])
    assert not teach.ask_mask(unsure, budget=0).any()


def test_the_side_with_the_lower_loss_teaches():
    token_losses = np.asarray([[9.0, 1.0, 3.0, 9.0], [1.0, 1.0, 1.0, 1.0], [0.0, np.nan, 0.0, 0.0]])
    targets = np.asarray([[-100, 5, 6, -100], [-100] * 4, [1, 2, 3, 4]])
    np.testing.assert_array_equal(teach.answer_losses(token_losses, targets), [2.0, np.inf, np.inf])
    first, second = [2.0, 1.0, 1.0, np.nan, np.inf, 5.0000001], [1.0, 2.0, 1.0, 3.0, np.nan, 5.0]
    found = teach.mutual_targets(first, second)
    np.testing.assert_array_equal(found.first_learns, [True, False, False, True, False, True])
    np.testing.assert_array_equal(found.second_learns, [False, True, False, False, False, False])


def test_bad_input_is_one_line():
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="temperature must be above 0"):
        teach.distillation_loss(x, x, temperature=0.0)
    with pytest.raises(ValueError, match=r"student_logits \(2, 3\) and teacher_logits \(3,\) differ"):
        teach.distillation_loss(x, x[0], temperature=1.0)
    with pytest.raises(ValueError, match="k < 3"):
        teach.top_k_distillation_loss(x, jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 4)), temperature=1.0)
