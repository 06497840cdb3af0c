"""Makes int4_formats.npz: what AutoAWQ and compressed-tensors themselves make of packed 4-bit weights.

    /tmp/golden/bin/pip install --no-deps compressed-tensors==0.20.0; /tmp/golden/bin/pip install loguru pydantic
    pip download --no-deps autoawq==0.2.9 && tar xzf autoawq-0.2.9.tar.gz        (with make_llama.py's environment)
    cd tests/golden && /tmp/golden/bin/python make_int4.py .../autoawq-0.2.9/awq/utils/packing_utils.py

AutoAWQ: random words and scales, and the matrix that its dequantize_gemm makes of them. compressed-tensors: random
weights, what its compressor writes, and what it makes of that again; groups of 32, then one per row, symmetric.
"""

import importlib.util
import pathlib
import sys

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

K, N, GROUP = 64, 24, 32
# Neither is a multiple of 8: the last words are filled up.
ODD_K, ODD_N = 44, 21


def awq(source: str) -> dict[str, np.ndarray]:
    """The matrix [K, N] of random words."""
    spec = importlib.util.spec_from_file_location("packing_utils", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rng = np.random.RandomState(0)
    qweight, qzeros = (rng.randint(-(2**31), 2**31, (rows, N // 8)).astype(np.int32) for rows in (K, K // GROUP))
    scales = rng.uniform(0.01, 0.1, (K // GROUP, N)).astype(np.float16)
    weight = module.dequantize_gemm(
        torch.from_numpy(qweight), torch.from_numpy(qzeros), torch.from_numpy(scales).float(), 4, GROUP
    )
    return {"awq_qweight": qweight, "awq_qzeros": qzeros, "awq_scales": scales, "awq_weight": weight.numpy()}


def compressed(prefix: str, n: int, k: int, **args) -> dict[str, np.ndarray]:
    """What the compressor writes for a random weight [n, k], and the weight [n, k] it reads back."""
    generator = torch.Generator().manual_seed(n * k)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4, type="int", **args))
    groups = k // args["group_size"] if "group_size" in args else 1
    state = {
        "weight": torch.randn(n, k, generator=generator),
        "weight_scale": torch.rand(n, groups, generator=generator) / 5 + 0.1,
        "weight_zero_point": torch.zeros(n, groups, dtype=torch.int8),
    }
    if not args["symmetric"]:
        state["weight_zero_point"] = torch.randint(-8, 8, (n, groups), generator=generator).to(torch.int8)
    written = PackedQuantizationCompressor.compress(dict(state), scheme)
    read = PackedQuantizationCompressor.decompress(dict(written), scheme)["weight"]
    return {f"{prefix}_{name}": value.numpy() for name, value in written.items()} | {f"{prefix}_weight": read.numpy()}


if __name__ == "__main__":
    np.savez_compressed(
        pathlib.Path(__file__).parent / "int4_formats.npz",
        **awq(sys.argv[1]),
        **compressed("group", N, K, strategy="group", group_size=GROUP, symmetric=False),
        **compressed("channel", ODD_N, ODD_K, strategy="channel", symmetric=False),
        **compressed("symmetric", N, K, strategy="group", group_size=GROUP, symmetric=True),
    )
