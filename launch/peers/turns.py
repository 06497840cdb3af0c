"""What every row of `launch.benchmark_decode --checkpoint` does in its own process: load, then measure when told to.

On stdin each line asks for one round of measurements, answered by one JSON line on stdout; the end of stdin ends the
process. The first line on stdout says that the model is loaded and warm. Imports nothing but the standard library, so
that it runs in a peer's environment too.
"""

import json
import pathlib
import sys
import time
from collections.abc import Callable


def rss_bytes() -> tuple[int, int]:
    """(resident memory of this process, its peak). Linux only: getrusage's peak holds what the parent had too."""
    fields = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    return tuple(1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))  # pyright: ignore[reportReturnType]


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """(wall, CPU of all threads) milliseconds of run()."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def round_figures(prefill: tuple[float, float], decode: tuple[float, float], num_tokens: int) -> dict[str, float]:
    """What `take_turns` reports of a round, from `timed` of a prompt and of num_tokens steps."""
    return {
        "decode_ms": decode[0] / num_tokens,
        "decode_cpu_ms": decode[1] / num_tokens,
        "prefill_ms": prefill[0],
        "prefill_cpu_ms": prefill[1],
    }


def take_turns(about: dict, base_bytes: int, measure: Callable[[], dict[str, float]]) -> None:
    """Warms up with one round, then answers. measure() -> {decode_ms and decode_cpu_ms, a token; prefill_ms and
    prefill_cpu_ms, the whole prompt}. base_bytes: resident memory before the model was loaded."""
    out = sys.stdout
    sys.stdout = sys.stderr  # what a library prints is no answer
    measure()
    print(json.dumps(about | {"base_bytes": base_bytes}), file=out, flush=True)
    for _ in sys.stdin:
        found = measure()
        rss, peak = rss_bytes()
        print(json.dumps(found | {"rss_bytes": rss, "peak_bytes": peak}), file=out, flush=True)
