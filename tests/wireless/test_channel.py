"""Geometry, path loss, shadowing and fading: closed forms and the golden values of TR 38.901."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.wireless import fading, geometry, network, path_loss, penetration, presets


def test_umi_golden_values_and_the_shape_of_nlos():
    distance = jnp.asarray([100.0, 200.0, 500.0])
    with jax.enable_x64(True):
        los = path_loss.umi_db(jnp.asarray([100.0, 200.0, 500.0]), True, fc_ghz=3.5)
        np.testing.assert_allclose(los, [85.314, 91.611, 107.108], atol=6e-4)
        # Two-slope laws are continuous at the breakpoint.
        for law, height in ((path_loss.umi_db, 10.0), (path_loss.uma_db, 25.0)):
            at = 4.0 * (height - 1.0) * 0.5 * 3.5e9 / path_loss.SPEED_OF_LIGHT_MPS
            near, far = law(jnp.asarray([at - 1e-6, at + 1e-6]), True, fc_ghz=3.5)
            assert abs(near - far) < 1e-5
    for law in (path_loss.umi_db, path_loss.uma_db):
        assert np.all(law(distance, False, fc_ghz=3.5) > law(distance, True, fc_ghz=3.5))
        assert np.isfinite(law(jnp.zeros(1), False, fc_ghz=3.5))[0]
    assert float(path_loss.log_distance_db(1000.0)) == pytest.approx(128.1, abs=1e-4)
    assert np.isfinite(path_loss.log_distance_db(jnp.zeros(1)))[0]
    np.testing.assert_allclose(
        path_loss.los_probability(jnp.asarray([5.0, 18.0, 100.0]), 36.0),
        [1.0, 1.0, 0.18 + np.exp(-100 / 36) * 0.82],
        rtol=1e-5,
    )


@pytest.mark.parametrize("cell, mean_square", [("disk", 0.5), ("square", 2.0 / 3.0), ("hexagon", 5.0 / 12.0)])
def test_drops_are_uniform(cell, mean_square):
    """E r^2 / R^2 of a uniform point, at four standard errors."""
    position = geometry.drop_users(jax.random.key(1), 40000, cell, 100.0)
    square = np.sum(np.square(position), axis=1) / 1e4
    assert abs(square.mean() - mean_square) < 4.0 * square.std() / 200.0
    assert np.all(np.abs(np.mean(position, axis=0)) < 4.0 * np.std(position, axis=0) / 200.0)


@pytest.mark.parametrize("mobility", ["random_waypoint", "gauss_markov"])
@pytest.mark.parametrize("cell", ["disk", "square"])
def test_users_stay_in_the_cell(mobility, cell):
    start = geometry.drop_users(jax.random.key(0), 500, cell, 100.0, 10.0)
    motion = geometry.init_motion(jax.random.key(1), start, mobility, 10.0, cell, 100.0)
    arguments = dict(
        mobility=mobility, speed_mps=10.0, memory_s=5.0, cell=cell, cell_radius_m=100.0, min_distance_m=10.0
    )
    step = jax.jit(lambda key, motion, dt: geometry.move(key, motion, dt, **arguments))
    for i, dt in enumerate((0.0, 0.01, 7.0, 300.0)):
        moved = step(jax.random.key(2 + i), motion, jnp.float32(dt))
        travelled = np.linalg.norm(moved.position_m - motion.position_m, axis=1)
        if mobility == "random_waypoint":
            # 20 m: twice the minimum distance, by which a user may be pushed off the base station.
            assert np.all(travelled <= 10.0 * dt + (20.0 if dt > 1.0 else 1e-3))
        motion = moved
        distance = np.linalg.norm(motion.position_m, axis=1)
        assert distance.min() >= 10.0 - 1e-3
        assert (distance.max() if cell == "disk" else np.abs(motion.position_m).max()) <= 100.0 + 1e-3


def test_gauss_markov_step_is_exact_for_any_length():
    """One step of 3 s and 30 of 0.1 s have the displacement variance 2 s^2 tau^2 (r - 1 + e^-r) of the stationary
    process."""
    users, tau = 20000, 2.0
    still = jnp.zeros((users, 2))
    velocity = 5.0 * np.sqrt(0.5) * jax.random.normal(jax.random.key(0), (users, 2))
    start = geometry.Motion(still, velocity, still)
    once = geometry.gauss_markov_step(jax.random.key(1), start, 3.0, 5.0, tau)
    many = jax.lax.fori_loop(
        0,
        30,
        lambda i, m: geometry.gauss_markov_step(
            jax.random.fold_in(jax.random.key(2), i), m, jnp.float32(0.1), 5.0, tau
        ),
        start,
    )
    expected = 2.0 * 12.5 * tau**2 * (1.5 - 1.0 + np.exp(-1.5))
    for motion in (once, many):
        variance = np.mean(np.square(motion.position_m))
        assert abs(variance / expected - 1.0) < 4.0 * np.sqrt(2.0 / (2 * users))
        assert abs(np.mean(np.square(motion.velocity_mps)) / 12.5 - 1.0) < 4.0 * np.sqrt(2.0 / (2 * users))


def test_shadowing_is_correlated_as_exp_minus_d():
    fields = 20000
    at = jnp.asarray([[0.0, 0.0], [5.0, 0.0], [6.0, 8.0], [0.0, -20.0]])
    values = jax.vmap(lambda key: fading.field_at(fading.init_field(key), at, 10.0))(
        jax.random.split(jax.random.key(3), fields)
    )
    correlation = np.mean(values * values[:, :1], axis=0)
    # Products of near-Gaussian unit variables have variance 1 + rho^2 <= 2.
    np.testing.assert_allclose(correlation, np.exp([0.0, -0.5, -1.0, -2.0]), atol=4.0 * np.sqrt(2.0 / fields))


def test_fading_chunk_equals_the_recurrence_and_has_jakes_correlation():
    rho = fading.time_correlation(9.7, 0.01)
    carry, kernel = fading.scatter_kernel(rho, 32)
    start = fading.scatter_init(jax.random.key(0), (4000,))
    chunk = fading.scatter_chunk(jax.random.key(1), start, carry, kernel)
    white = fading.scatter_init(jax.random.key(1), (4000, 32))
    state, expected = start, []
    for t in range(32):
        state = rho * state + jnp.sqrt(1.0 - rho**2) * white[:, :, t]
        expected.append(state)
    np.testing.assert_allclose(chunk, np.stack(expected, axis=2), atol=1e-5)
    assert float(fading.time_correlation(1.0, 0.1)) == pytest.approx(0.903713, abs=2e-6)


def test_rician_power_and_multiuser_diversity():
    scatter = fading.scatter_init(jax.random.key(0), (40000, 10))
    for k in (0.0, 1.0, 8.0):
        power = fading.power_gain(scatter, k, 0.3)
        variance = (1.0 + 2.0 * k) / (1.0 + k) ** 2
        assert abs(power.mean() - 1.0) < 4.0 * np.sqrt(variance / power.size)
        assert abs(power.var() / variance - 1.0) < 0.05
    best = np.max(fading.power_gain(scatter, 0.0, 0.0), axis=1)
    assert abs(best.mean() - 2.928968) < 4.0 * best.std() / 200.0


def test_penetration_losses_of_38901():
    """Walls by TR 38.901 (Sionna 2.2 with its Release-16 tables has the same) at 3.5 GHz, and the random parts."""
    glass, coated, concrete = (10.0 ** (-db / 10.0) for db in (2.7, 24.05, 19.0))
    low, high = 5 - 10 * np.log10(0.3 * glass + 0.7 * concrete), 5 - 10 * np.log10(0.7 * coated + 0.3 * concrete)
    assert penetration.wall_loss_db("o2i_low", 3.5) == pytest.approx(low) and low == pytest.approx(12.697503, abs=1e-6)
    assert penetration.wall_loss_db("o2i_high", 3.5) == pytest.approx(high) and high == pytest.approx(
        26.849786, abs=1e-6
    )
    users = 40000
    indoor, draw = penetration.draw_indoor_m(jax.random.key(0), users), jax.random.normal(jax.random.key(1), (users,))
    assert abs(np.mean(indoor) - 25.0 / 3.0) < 4.0 * np.std(indoor) / 200.0 and np.max(indoor) <= 25.0
    for kind, mean, std in (("o2i_low", low, 4.4), ("o2i_high", high, 6.5), ("car", 9.0, 5.0)):
        inside = 0.5 * indoor if penetration.is_indoor(kind) else jnp.zeros(users)
        rest = penetration.penetration_db(kind, 3.5, indoor, draw) - inside
        assert abs(np.mean(rest) - mean) < 4.0 * std / 200.0 and np.std(rest) == pytest.approx(std, rel=0.02)
    assert not np.any(penetration.penetration_db("none", 3.5, indoor, draw))


def test_clients_behind_walls_have_their_own_channel():
    key, users = jax.random.key(0), 4000
    state, channel = (
        network.init_network(presets.umi_20(num_clients=users), key),
        jax.jit(network.channel, static_argnums=0),
    )
    of = {kind: channel(presets.umi_20(num_clients=users, penetration=kind), state) for kind in penetration.KINDS}
    outside = of["none"]
    np.testing.assert_allclose(
        of["car"].path_loss_db - outside.path_loss_db, 9.0 + 5.0 * state.penetration_draw, atol=1e-4
    )
    np.testing.assert_array_equal(of["car"].rician_k, outside.rician_k)
    for kind in ("o2i_low", "o2i_high"):
        inside = of[kind]
        assert np.all(inside.rician_k == 0.0)
        # The wall is nearer than the client: more lines of sight, never fewer.
        assert np.sum(inside.los & ~outside.los) > 0 == np.sum(outside.los & ~inside.los)
        same = np.asarray(inside.los == outside.los)
        loss = penetration.penetration_db(kind, 3.5, state.indoor_m, state.penetration_draw)
        np.testing.assert_allclose((inside.path_loss_db - outside.path_loss_db)[same], loss[same], atol=1e-4)
    with pytest.raises(ValueError, match="penetration"):
        presets.yang(penetration="car")
