"""Selection: distributions, the network's predictions, Oort against a plain loop, and going on from a saved state."""

import math

import numpy as np
import pytest

from fmfl_jax.fed import selection


def play(selector, num_clients, rounds, *, losses=None, seconds=None, state=None, first=0, predicted_s=None):
    """(cohorts, state) of rounds in which everybody is delivered with its fixed loss and time."""
    losses = np.ones(num_clients) if losses is None else losses
    seconds = np.ones(num_clients) if seconds is None else seconds
    state, cohorts = selector.init(num_clients) if state is None else state, []
    for r in range(first, rounds):
        ids = selector.select(state, round=r, seed=3, predicted_s=predicted_s)
        assert np.all(np.diff(ids) > 0)  # sorted, nobody twice
        state = selector.observe(state, ids, losses[ids], seconds[ids])
        cohorts.append(ids)
    return cohorts, state


def test_uniform_is_uniform_and_poisson_has_its_rate():
    rounds, count = 2000, 12
    for selector, rate in ((selection.uniform(3), 0.25), (selection.poisson(0.25), 0.25)):
        cohorts, _ = play(selector, count, rounds)
        share = np.bincount(np.concatenate(cohorts), minlength=count) / rounds
        assert np.all(np.abs(share - rate) < 4 * math.sqrt(rate * (1 - rate) / rounds))
        capacity = selector.capacity(count, num_rounds=rounds, seed=3)
        assert capacity == max(map(len, cohorts))
    together = np.mean([{0, 1} <= set(ids.tolist()) for ids in play(selection.uniform(3), count, rounds)[0]])
    assert together == pytest.approx(3 * 2 / (12 * 11), abs=4 * math.sqrt(0.045 / rounds))  # pairs too


def test_a_deadline_asks_only_those_who_can_meet_it():
    predicted = np.asarray([1, 9, 2, np.inf, 3, 4, 9, 5], np.float32)
    selector = selection.deadline_aware(3, 5.0)
    cohorts, _ = play(selector, 8, 300, predicted_s=predicted)
    share = np.bincount(np.concatenate(cohorts), minlength=8) / 300
    assert np.all(share[[1, 3, 6]] == 0) and np.all(np.abs(share[[0, 2, 4, 5, 7]] - 0.6) < 4 * math.sqrt(0.24 / 300))
    state = selector.init(8)
    assert selector.select(state, round=0, seed=0, predicted_s=predicted + 3).tolist() == [0, 2]  # fewer than asked for
    assert len(selector.select(state, round=0, seed=0, predicted_s=predicted + 9)) == 0
    with pytest.raises(ValueError, match="needs a prediction"):
        selector.select(state, round=0, seed=0)


def plain_utilities(sizes, seen, rounds, quantile, alpha):
    """Oort's score, one client after another. seen: {client: (loss, seconds, round)}."""
    values = {i: sizes[i] * loss for i, (loss, _, _) in seen.items()}
    most = np.quantile(list(values.values()), 0.95)
    preferred = np.quantile([t for _, t, _ in seen.values()], quantile)
    scores = {}
    for i, (_, t, last) in seen.items():
        scores[i] = min(values[i], most) / most + math.sqrt(0.1 * math.log(rounds) / last)
        if t > preferred:
            scores[i] *= (preferred / t) ** alpha
    return scores


def test_oort_scores_as_a_plain_loop():
    rng = np.random.default_rng(0)
    sizes, losses, seconds = rng.integers(1, 50, 9), rng.random(9) * 3, rng.random(9) + 0.5
    selector = selection.oort(4, sizes)
    state, seen = selector.init(9), {}
    for r, ids in enumerate([[0, 1, 2], [2, 3, 5], [], [0, 8, 7]]):
        ids = np.asarray(ids, int)
        state = selector.observe(state, ids, losses[ids], seconds[ids])
        seen |= {i: (losses[i], seconds[i], r + 1) for i in ids.tolist()}
    found = selection._utilities(state, 2.0)
    expected = plain_utilities(sizes, seen, rounds=5, quantile=0.3, alpha=2.0)
    for i, score in expected.items():
        assert found[i] == pytest.approx(score, rel=1e-12)
    # With exploration at its least, 4 of a cohort of 5 are known clients, and only those near the best four can be.
    fourth = sorted(expected.values())[-4]
    may = {i for i, score in expected.items() if score >= 0.95 * fourth}
    selector = selection.oort(5, sizes)
    ids = set(selector.select(state, round=500, seed=0).tolist())
    assert len(ids & set(seen)) == 4 and ids & set(seen) <= may and len(ids - set(seen)) == 1


def test_oort_prefers_high_losses_and_fast_clients_and_sees_everybody():
    count = 40
    losses, seconds = np.where(np.arange(count) % 2, 2.0, 0.2), np.where(np.arange(count) < 20, 1.0, 10.0)
    cohorts, state = play(selection.oort(5, np.full(count, 10)), count, 200, losses=losses, seconds=seconds)
    assert all(len(ids) == 5 for ids in cohorts) and np.all(state["last_round"] > 0)
    late = np.bincount(np.concatenate(cohorts[60:]), minlength=count)
    high, fast = np.arange(count) % 2 == 1, np.arange(count) < 20
    assert late[high & fast].sum() > 3 * late[~high & fast].sum()
    assert late[high & fast].sum() > 3 * late[high & ~fast].sum()
    first, _ = play(selection.oort(5, np.full(count, 10)), count, 1, predicted_s=np.where(fast, 1.0, 1e6))
    assert np.all(fast[first[0]])  # unseen clients by their predicted speed


def test_oort_survives_losses_that_are_not_finite_and_the_pacer_relaxes():
    selector = selection.oort(3, np.full(4, 10))
    losses = np.asarray([np.nan, np.inf, 1.0, 1.0])
    _, state = play(selector, 4, 20, losses=losses)
    assert np.all(np.isfinite(state["utility"])) and state["utility"][0] == 0
    assert state["quantile"] == pytest.approx(0.3)
    _, state = play(selector, 4, 40, losses=losses * 0.5, state=state, first=20)
    assert state["quantile"] == pytest.approx(0.35)


@pytest.mark.parametrize(
    "make", [lambda: selection.uniform(3), lambda: selection.poisson(0.3), lambda: selection.oort(3, np.arange(1, 11))]
)
def test_going_on_from_a_saved_state_gives_the_same_cohorts(make, tmp_path):
    losses = np.linspace(0.1, 2, 10)
    whole, _ = play(make(), 10, 30, losses=losses)
    _, state = play(make(), 10, 12, losses=losses)
    np.savez(tmp_path / "state.npz", **state)
    loaded = dict(np.load(tmp_path / "state.npz"))
    assert all(isinstance(value, np.ndarray) for value in state.values())
    rest, _ = play(make(), 10, 30, losses=losses, state=loaded, first=12)
    for a, b in zip(whole[12:], rest, strict=True):
        np.testing.assert_array_equal(a, b)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="cohort_size is 5"):
        selection.oort(5, np.ones(4))
    with pytest.raises(ValueError, match="Oort's exploration: a share of 0.2 of 2 clients is none"):
        selection.oort(2, np.ones(4))
    with pytest.raises(ValueError, match="deadline_s must be above 0"):
        selection.deadline_aware(3, 0.0)
