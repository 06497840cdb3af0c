"""The predictor's counts by hand-written machine code, and the bounds that the shipped kernels are held to."""

import functools
import json

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
    found = dict(registers=126, stack=0, shared=57600, loop=600, per_weight=2.3, waits=8, threads=128)
    return predict.Kernel(**found | dict(step_bytes=16384, stages=3) | changed)


def test_residency_is_the_scarcest_resource():
    h200 = predict.GPUS["h200"]
    assert kernel_of().resident(h200) == 3  # shared memory: 233,472 / 58,624
    assert kernel_of(shared=16000).resident(h200) == 4  # registers: 65,536 / (128 * 128)
    assert kernel_of(shared=16000, registers=8).resident(h200) == 13
    assert kernel_of(shared=0, registers=8, threads=1024).resident(h200) == 2  # threads


def test_a_prediction_is_bounded_by_memory_and_by_issue():
    """A kernel of no instructions takes the copy's time and the ramp, and one of very many its issue time."""
    k, n = shapes.projections("7b")["qkv"]
    h200 = predict.GPUS["h200"]
    launched = predict.launch_of(1, k, n, swiglu=False)
    far = dict(step_bytes=2**40, waits=0)
    free = predict.predict(launched, kernel_of(loop=0, **far), k, n, h200)
    floor = shapes.packed_bytes(k, n) / 4300e3
    assert free.us == pytest.approx(predict.RAMP_US + floor, rel=1e-3) and free.limit == "memory"
    slow = predict.predict(launched, kernel_of(loop=10**6, **far), k, n, h200)
    assert slow.us == pytest.approx(3 * 4 * 10**6 / 1.75e3, rel=1e-3) and slow.limit == "issue"  # 3 programs, 4 steps
    assert free.busy == pytest.approx(384 / 396)


@functools.cache
def shipped(name, m, capability):
    """(launch, kernel) of 7B's projection."""
    k, n = shapes.projections("7b")[name]
    launched = predict.launch_of(m, k, n, swiglu=predict.is_swiglu(name, m))
    return launched, predict.read(launched, capability)


# The goals were 1.4 for M <= 4 and 2.0 for M <= 16: what is reached is held here.
@pytest.mark.parametrize(
    "name, m, capability, per_weight",
    [
        ("qkv", 8, 90, 1.45),
        ("qkv", 16, 90, 2.02),
        ("gate_up", 8, 90, 1.80),
        ("gate_up", 16, 90, 2.35),
        ("qkv", 8, 80, 1.50),
        ("qkv", 16, 80, 2.10),
        ("gate_up", 8, 80, 1.85),
    ],
)
def test_instructions_a_weight(name, m, capability, per_weight):
    _, kernel = shipped(name, m, capability)
    assert kernel.stack == 0
    assert kernel.per_weight <= per_weight and kernel.waits <= 3


@pytest.mark.parametrize("name, busy, fraction", [("qkv", 0.9, 0.79), ("o", 0.9, 0.59), ("down", 0.9, 0.76)])
def test_predicted_for_an_h200(name, busy, fraction):
    """All programs but one an SM are resident at once, the SMs are evenly loaded; the goal of .70 but for o."""
    k, n = shapes.projections("7b")[name]
    for m in (1, 8):
        launched, _ = shipped(name, m, 90)
        found = predict.predict(launched, shipped(name, 8, 90)[1], k, n, predict.GPUS["h200"])
        assert found.programs <= (found.resident + 1) * configs.SMS
        assert found.busy >= busy and found.fraction >= fraction


def test_swiglu_predicted_for_an_h200():
    launched, kernel = shipped("gate_up", 8, 90)
    found = predict.predict(launched, kernel, *shapes.projections("7b")["gate_up"], predict.GPUS["h200"])
    assert found.waves == 1 and found.busy >= 0.86 and found.fraction >= 0.71  # goals .90 and .70


def test_prints_what_a_gpu_measured_beside(tmp_path):
    row = {"model": "7b", "projection": "o", "m": 64, "copy_fraction": 0.4321}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"table": [row]}))
    done = run("kernels.w4a16.predict", "--model=7b", "--rows=64", f"--json={path}")
    lines = done.out.splitlines()
    assert "not measured" in lines[0] and len(lines) == 6
    assert [line.split()[-1] for line in lines if " o " in line] == ["0.43"]
