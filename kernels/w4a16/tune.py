"""`python -m kernels.w4a16.tune`: times candidate configurations on the GPU and prints the table for configs.py.

For every shape class (M) and projection of LLaMA-7B it prints each candidate's microseconds, fastest first, beside the
shipped entry; then, per class, the candidate with the smallest total over the projections. Nothing is written: a person
copies the entry to configs.py, and the compile tests hold it to their rules.
"""

import itertools
import math
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from kernels.w4a16 import configs, gpu, measure, shapes

FLAGS = flags.FLAGS
GROUP = 128
ROWS = (1, 16, 32, 64, 128, 256)


def define_flags() -> None:
    """Flags of this program (defined here so that importing the module defines none)."""
    flags.DEFINE_float("budget_s", 540.0, "Seconds after which tuning stops.")
    flags.DEFINE_multi_integer("rows", list(ROWS), "Which M to tune.")


def candidates(m: int) -> list[configs.Config]:
    """The configurations worth a try at M rows."""
    if m <= 16:
        sizes = {8 if m <= 8 else 16}
        space = ((128, 256), ((2, 2), (2, 3), (2, 4), (4, 3), (4, 4)), (2, 3, 4, 6))
    elif m <= 32:
        sizes, space = {32}, ((64, 128, 256), ((4, 2), (4, 3), (8, 3), (8, 4)), (1, 2, 3))
    else:
        sizes, space = {min(m, 128), 64}, ((64, 128, 256), ((4, 2), (4, 3), (8, 2), (8, 3)), (1, 2))
    found = [
        configs.Config(block_m=size, block_n=block_n, num_warps=warps, num_stages=stages, resident=resident)
        for size in sorted(sizes)
        for block_n, (warps, stages), resident in itertools.product(*space)
    ]
    return [config for config in found if not config.few_rows or config.strips in (2, 4, 8)]


def tune_one(m: int, k: int, n: int, deadline: float) -> dict[configs.Config, float]:
    """Microseconds of every candidate that launches."""
    count = measure.num_sets(shapes.packed_bytes(k, n))
    packed = [measure.random_weight(key, k, n, GROUP) for key in jax.random.split(jax.random.key(0), count)]
    x = jax.random.normal(jax.random.key(1), (m, k), jnp.bfloat16)
    sets, launched, times = [(x, *p) for p in packed], {}, {}
    shipped = configs.choose(configs.MATMUL, m)
    tried = candidates(m) if shipped is None else [shipped, *candidates(m)]
    for config in dict.fromkeys(tried):
        tiles = -(-n // config.block_n) * -(-m // config.block_m)
        launch = configs.splits(rows=m, tiles=tiles, steps=-(-k // config.step_rows), config=config)
        same = (config.block_m, config.block_n, config.num_warps, config.num_stages, launch)
        if same in launched:  # another number of resident programs that comes to the same splits
            times[config] = launched[same]
        if same in launched or time.monotonic() > deadline:
            continue

        def run(x, *p, config=config):
            return gpu.matmul(x, None, None, *p, k=k, n=n, group_size=GROUP, config=config)

        try:
            times[config], _ = measure.time_us(run, sets, repeats=3)
            launched[same] = times[config]
        except Exception as error:  # out of shared memory or registers: such a candidate is out, the others go on
            print(f"#   {config}: {str(error).splitlines()[0][:100]}", flush=True)
    return times


def main(argv) -> None:
    del argv
    device = measure.require_gpu("kernels.w4a16.tune")
    deadline = time.monotonic() + FLAGS.budget_s
    print(f"{device.device_kind}: copy {measure.copy_gbps():.0f} GB/s", flush=True)
    for m in FLAGS.rows:
        timed = []
        for name, (k, n) in shapes.projections("7b").items():
            times = tune_one(m, k, n, deadline)
            shipped = configs.choose(configs.MATMUL, m)
            us = math.nan if shipped is None else times.get(shipped, math.nan)
            print(f"M={m} {name} K={k} N={n}: shipped {us:.1f} us")
            for config, us in sorted(times.items(), key=lambda item: item[1])[:5]:
                print(f"  {us:9.1f} us {shapes.packed_bytes(k, n) / us / 1e3:7.0f} GB/s  {config}", flush=True)
            timed.append(times)
        everywhere = set.intersection(*(set(times) for times in timed))
        totals = {config: sum(times[config] for times in timed) for config in everywhere}
        for config, us in sorted(totals.items(), key=lambda item: item[1])[:3]:
            print(f"M={m}: {us:9.1f} us in total  {config}", flush=True)


if __name__ == "__main__":
    define_flags()
    app.run(main)
