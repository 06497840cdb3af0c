"""Splits of layers against brute force over all maps from layers to devices, and the golden of the facts."""

import itertools

import numpy as np
import pytest

from fmfl_jax.services.split import OBJECTIVES, ChainCost, split_layers

GOLDEN = ChainCost(
    compute_s=np.outer([1, 1, 1, 1, 1, 2], [0.004, 0.002, 0.001]),
    memory_bytes=np.asarray([1, 1, 1, 1, 1, 2]),
    capacity_bytes=np.asarray([4, 3, 3]),
    transfer_s=np.asarray([[0, 3, 9], [3, 0, 5], [9, 5, 0]]) * 1e-3,
)


def random_cost(rng):
    layers, devices = int(rng.integers(1, 6)), int(rng.integers(1, 4))
    transfer = rng.uniform(0, 5, (devices, devices))
    transfer[rng.random((devices, devices)) < 0.15] = np.inf
    np.fill_diagonal(transfer, 0.0)
    return ChainCost(
        rng.uniform(0.5, 3, (layers, devices)),
        rng.integers(1, 4, layers),
        rng.integers(2, 8, devices),
        transfer,
    )


def brute_force(cost, objective, source, revisits, pin_first):
    """The least seconds over all maps; infinite where none is allowed."""
    best = np.inf
    for devices in itertools.product(range(cost.num_devices), repeat=cost.num_layers):
        blocks = [[next(g), *g] for _, g in itertools.groupby(range(cost.num_layers), key=lambda i: devices[i])]
        owners = [devices[block[0]] for block in blocks]
        if (pin_first and devices[0] != source) or (not revisits and len(set(owners)) < len(owners)):
            continue
        if any(cost.memory_bytes[b].sum() > cost.capacity_bytes[d] for b, d in zip(blocks, owners)):
            continue
        path = [source, *owners, source]
        costs = [cost.transfer_s[a, b] for a, b in itertools.pairwise(path)]
        costs += [cost.compute_s[block, d].sum() for block, d in zip(blocks, owners)]
        best = min(best, sum(costs) if objective == "latency" else max(costs))
    return best


def test_golden():
    assert split_layers(GOLDEN).devices == (0, 0, 0, 0, 1, 1)
    assert split_layers(GOLDEN).seconds == pytest.approx(0.028)
    # The facts' [0, 0, 1, 1, 1, 2] is one of several with 9 ms: the way back from device 2 takes as long.
    assert split_layers(GOLDEN, objective="stage").seconds == pytest.approx(0.009)
    assert brute_force(GOLDEN, "stage", 0, False, True) == pytest.approx(0.009)


@pytest.mark.parametrize("seed", range(30))
def test_it_is_the_best_of_all_maps(seed):
    rng = np.random.default_rng(seed)
    cost, source, pin = random_cost(rng), 0, bool(rng.random() < 0.5)
    if cost.num_devices > 1 and rng.random() < 0.5:
        source = 1
    for objective, revisits in ((OBJECTIVES[0], False), (OBJECTIVES[0], True), (OBJECTIVES[1], False)):
        expected = brute_force(cost, objective, source, revisits, pin)
        options = dict(objective=objective, source=source, revisits=revisits, pin_first=pin)
        if np.isinf(expected):
            with pytest.raises(ValueError, match="fits the devices' memories"):
                split_layers(cost, **options)
            continue
        found = split_layers(cost, **options)
        assert found.seconds == pytest.approx(expected)
        assert len(found.devices) == cost.num_layers


def test_a_revisit_can_pay():
    """The middle layer is slow at home, the others elsewhere."""
    cost = ChainCost(np.asarray([[1, 9], [9, 1], [1, 9.0]]), np.ones(3), np.full(2, 3.0), np.asarray([[0, 1], [1, 0]]))
    assert split_layers(cost, revisits=True) == ((0, 1, 0), 5.0)
    assert split_layers(cost).seconds == 11.0


def test_bad_input_is_one_line():
    with pytest.raises(ValueError, match="objective=speed: expected one of latency, stage"):
        split_layers(GOLDEN, objective="speed")
    with pytest.raises(ValueError, match="revisits=True is for objective=latency"):
        split_layers(GOLDEN, objective="stage", revisits=True)
    with pytest.raises(ValueError, match="source=3"):
        split_layers(GOLDEN, source=3)
    with pytest.raises(ValueError, match="memory_bytes must hold finite numbers"):
        ChainCost(GOLDEN.compute_s, np.full(6, np.nan), GOLDEN.capacity_bytes, GOLDEN.transfer_s)
    with pytest.raises(ValueError, match="do not fit"):
        ChainCost(GOLDEN.compute_s, np.ones(5), GOLDEN.capacity_bytes, GOLDEN.transfer_s)
    with pytest.raises(ValueError, match="at most 16"):
        split_layers(ChainCost(np.ones((2, 17)), np.ones(2), np.ones(17), np.zeros((17, 17))))
    with pytest.raises(ValueError, match="reaches itself in 0 s"):
        ChainCost(GOLDEN.compute_s, GOLDEN.memory_bytes, GOLDEN.capacity_bytes, np.ones((3, 3)))
