"""Compiles decoding of LLaMA-7B layers for an H200 that is not there, and prints what XLA will do, a JSON object for
each case "peft,layers,batch,slots".

Started by test_decode_ahead_of_time.py, in a process of its own: XLA reads its flags and its dump folder once. Needs
jax's CUDA plugin; ptxas and libdevice are those of Triton's wheel.
"""

import functools
import json
import os
import pathlib
import re
import sys
import tempfile

import jax
import jax.numpy as jnp
import triton
from jax.experimental import topologies

from fmfl_jax.config import llama_preset
from fmfl_jax.models.generate import DecodeState, Sampling, init_cache, jit_generator
from fmfl_jax.models.random_init import random_int4_params
from fmfl_jax.peft.adapter import AdapterConfig
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.split import NoPeftConfig, split
from kernels.w4a16 import launch


def compiled(peft, layers: int, batch: int, slots: int):
    """The compiled decode loop, from shapes alone."""
    target = (pathlib.Path(__file__).parent / "h200.txtpb").read_text(encoding="utf-8")
    kind = {"platform": "cuda", "topology_name": "1x1x1", "topology": "1x1x1"}
    device = topologies.get_topology_desc(**kind, target_config=target).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    place = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)
    config = llama_preset("7b", num_layers=layers, dtype="bfloat16")
    kept = {}

    def parameters(key):
        s = split(config, random_int4_params(config, key, group_size=128, head=False), peft, key=key)
        kept["merge"] = s.merge
        return s.trainable, s.frozen

    trainable, frozen = place(jax.eval_shape(parameters, jax.random.key(0)))
    zeros = jnp.zeros(batch, jnp.int32)
    cache = jax.eval_shape(lambda: init_cache(config, batch, slots))
    state = place(DecodeState(cache, zeros, zeros, zeros.astype(bool), jax.random.key(0)))
    _, decode_fn = jit_generator(kept["merge"], Sampling())
    return decode_fn.trace(trainable, frozen, state, 64).lower().compile()


def launches(path: pathlib.Path) -> dict:
    """Of the loop's body: nodes, how many are in command buffers, command buffers, transpositions in the program."""
    text = path.read_text(encoding="utf-8")
    body = text[text.index("  body:") :]
    lines = [line for line in body.splitlines()[1:] if re.match(r"\s{4,}\d+: k", line)]
    buffers = [line for line in lines if "kCommandBuffer" in line]
    inside = [line for line in lines if re.match(r"\s{8}\d+: k", line)]
    nodes = len(lines) - len(buffers)
    return {
        "nodes": nodes,
        "captured": len(inside),
        "buffers": len(buffers),
        "transposes": len(re.findall("transpose", text)),
    }


PEFT = {"none": NoPeftConfig(), "lora": LoraConfig(), "adapter": AdapterConfig()}


def main(cases: list[str]):
    nvidia = pathlib.Path(triton.__file__).parent / "backends" / "nvidia"
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for name, source in (("bin/ptxas", "bin/ptxas"), ("nvvm/libdevice/libdevice.10.bc", "lib/libdevice.10.bc")):
            (root / name).parent.mkdir(parents=True)
            (root / name).symlink_to(nvidia / source)
        # XLA reads them when its first backend starts.
        os.environ["XLA_FLAGS"] = f"--xla_gpu_cuda_data_dir={root} --xla_gpu_autotune_level=0 --xla_dump_to={root}/dump"
        launch.call = functools.partial(launch.call, compute_capability=90)
        for case in cases:
            peft, *sizes = case.split(",")
            program = compiled(PEFT[peft], *map(int, sizes))
            (dump,) = (root / "dump").glob("*decode_fn*thunk_sequence_after_thunk_passes.txt")
            print(json.dumps(launches(dump) | {"temp_bytes": program.memory_analysis().temp_size_in_bytes}))
            dump.unlink()


if __name__ == "__main__":
    main(sys.argv[1:])
