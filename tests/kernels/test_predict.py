"""The predictor's counts by hand-written machine code, and the bounds that the shipped kernels are held to."""

import functools
import json
from typing import Any

import pytest

from kernels.w4a16 import configs, predict, sass, shapes
from tests.commands import run

pytestmark = pytest.mark.usefixtures("kept_listings")

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                     /* 0x00000a0000017a02 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64] ; /* 0x0 */
        /*0020*/              @!P0 LOP3.LUT R0, R1, 0xf, RZ, 0xc0, !PT ;       /* 0x0 */
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;               /* 0x0 */
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;        /* 0x0 */
        /*0050*/                   NOP ;                                       /* 0x0 */
        /*0060*/               @P0 BRA 0x20 ;                                  /* 0x0 */
        /*0070*/                   IMAD R0, R0, R1, RZ ;                       /* 0x0 */
        /*0080*/               @P1 BRA 0x70 ;                                  /* 0x0 */
        /*0090*/               @P2 BRA 0x10 ;                                  /* 0x0 */
        /*00a0*/                   BRA 0xa0 ;                                  /* 0x0 */
"""


def test_main_loop_is_the_shortest_with_the_matrix_instructions():
    body = sass.main_loop(LISTING)
    assert [sass.opcode(t) for t in body] == ["LOP3", "BAR", "HMMA", "BRA"]
    assert sass.histogram(body)["LOP3"] == 1
    with pytest.raises(ValueError, match="no loop"):
        sass.main_loop(LISTING.replace("HMMA", "FFMA"))


def kernel_of(**changed):
    found: dict[str, Any] = {"registers": 126, "stack": 0, "shared": 57600, "loop": 600, "per_weight": 2.3, "waits": 8}
    found |= {"products": (0, 0), "threads": 128, "step_bytes": 16384, "stages": 3} | changed
    return predict.Kernel(**found)


def test_residency_is_the_scarcest_resource():
    h200 = predict.GPUS["h200"]
    assert kernel_of().resident(h200) == 3  # shared memory: 233,472 / 58,624
    assert kernel_of(shared=16000).resident(h200) == 4  # registers: 65,536 / (128 * 128)
    assert kernel_of(shared=16000, registers=8).resident(h200) == 13
    assert kernel_of(shared=0, registers=8, threads=1024).resident(h200) == 2  # threads


def test_products_are_counted_by_instruction():
    body = [
        "HMMA.16816.F32.BF16 R8, R4, R6, R8",
        "@P0 HGMMA.64x32x16.F32.BF16 R24, R4, gdesc[UR8], R24",
        "FFMA R0, R1, R2",
    ]
    assert sass.products(body) == (16 * 8 * 16, 16 * 32 * 16)


def test_a_prediction_is_bounded_by_memory_by_issue_and_by_the_tensor_cores():
    """A kernel of no instructions takes the copy's time and the ramp, and one of very many its issue time."""
    k, n = shapes.projections("7b")["qkv"]
    h200 = predict.GPUS["h200"]
    launched = predict.launch_of(1, k, n, swiglu=False)
    assert launched.grid == (48, 1, 8)  # 3 programs an SM, 2 steps each
    far = {"step_bytes": 2**40, "waits": 0}
    free = predict.predict(launched, kernel_of(loop=0, **far), 1, k, n, h200)
    floor = shapes.packed_bytes(k, n) / 4300e3
    assert free.us == pytest.approx(predict.RAMP_US + floor, rel=1e-3) and free.limit == "memory"
    slow = predict.predict(launched, kernel_of(loop=10**6, **far), 1, k, n, h200)
    assert slow.us == pytest.approx(3 * 2 * 10**6 / 1.75e3, rel=1e-3) and slow.limit == "issue"
    products = kernel_of(loop=0, products=(63 * 10**7, 10**9), **far)
    slow = predict.predict(launched, products, 1, k, n, h200)
    assert slow.us == pytest.approx(3 * 2 * 2 * 10**9 / 512 / 1.75e3, rel=1e-3) and slow.limit == "tensor"
    assert free.busy == pytest.approx(384 / 396)


def test_a_prediction_is_bounded_by_the_l2():
    """Each of 48 tiles of columns reads x, and 5 sums of every output are written and read."""
    k, n = shapes.projections("7b")["qkv"]
    launched = predict.launch_of(16, k, n, swiglu=False)
    assert launched.grid == (48, 1, 5)
    found = predict.predict(launched, kernel_of(loop=0, waits=0, step_bytes=2**40), 16, k, n, predict.GPUS["h200"])
    asked_for = shapes.packed_bytes(k, n) + 48 * 16 * k * 2 + 2 * 5 * 16 * n * 4
    assert found.us == pytest.approx(predict.RAMP_US + asked_for / 5500e3, rel=1e-3) and found.limit == "L2"


@functools.cache
def shipped(name, m, capability):
    """(launch, kernel) of 7B's projection."""
    k, n = shapes.projections("7b")[name]
    launched = predict.launch_of(m, k, n, swiglu=predict.is_swiglu(name, m))
    return launched, predict.read(launched, capability)


# The goals were 1.4 for M <= 4 and 2.0 for M <= 16: what is reached is held here.
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "name, m, per_weight", [("qkv", 8, 1.42), ("qkv", 16, 1.94), ("gate_up", 8, 1.42), ("gate_up", 16, 1.96)]
)
def test_instructions_a_weight(name, m, per_weight, capability):
    _, kernel = shipped(name, m, capability)
    assert kernel.stack == 0
    assert kernel.per_weight <= per_weight and kernel.waits <= 3


@pytest.mark.parametrize(
    "name, m, fraction",
    [
        ("qkv", 1, 0.79),
        ("qkv", 8, 0.75),
        ("qkv", 16, 0.64),
        ("o", 1, 0.59),
        ("o", 8, 0.57),
        ("o", 16, 0.46),
        ("gate_up", 1, 0.77),
        ("gate_up", 8, 0.77),
        ("gate_up", 16, 0.68),
        ("down", 1, 0.77),
        ("down", 8, 0.76),
        ("down", 16, 0.61),
    ],
)
def test_predicted_for_an_h200(name, m, fraction):
    """All programs but one an SM are resident at once, the SMs evenly loaded (goal .90); of a copy the goal is .70."""
    k, n = shapes.projections("7b")[name]
    launched, _ = shipped(name, m, 90)
    found = predict.predict(launched, shipped(name, max(8, m), 90)[1], m, k, n, predict.GPUS["h200"])
    assert found.programs <= (found.resident + 1) * configs.SMS
    assert found.busy >= 0.9 and found.fraction >= fraction


def test_prints_what_a_gpu_measured_beside(tmp_path):
    """The card is the file's, and so is its copy rate."""
    row = {"model": "7b", "projection": "o", "m": 64, "copy_fraction": 0.4321}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"device": "NVIDIA H100 80GB HBM3", "copy_gbps": 2950.0, "table": [row]}))
    done = run("kernels.w4a16.predict", "--model=7b", "--rows=64", f"--json={path}")
    lines = done.out.splitlines()
    assert "not measured: NVIDIA H100 80GB HBM3, sm_90, copy 2950 GB/s" in lines[0] and len(lines) == 6
    assert [line.split()[-1] for line in lines if " o " in line] == ["0.43"]


def test_what_is_measured_is_compared_with_what_is_predicted():
    """A decode step's gate and up are predicted with SwiGLU: the plain product's figure says nothing of it."""
    table = [{"model": "7b", "projection": "gate_up", "m": m, "copy_fraction": 0.1} for m in (1, 32)]
    extras = [{"name": "fused", "m": 1, "copy_fraction": 0.8}, {"name": "backward", "us": 3.0}]
    found = predict.measured_fractions({"table": table, "extras": extras})
    assert found == {("7b", "gate_up", 1): 0.8, ("7b", "gate_up", 32): 0.1}
    with pytest.raises(SystemExit, match="RTX 4090"):
        predict.card({"device": "NVIDIA GeForce RTX 4090"})
