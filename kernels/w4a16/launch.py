"""Launching a Triton kernel from JAX: the only file that imports jax_triton, and it does so inside the function.

On CUDA, `jax_triton.triton_call` (0.3.1; facts on versions in BUILD_NOTES.md), lowered to the call target that XLA can
capture in a CUDA graph. With TRITON_INTERPRET=1 in the
environment before triton is imported, the same kernel source runs in Triton's interpreter on numpy arrays, through
`jax.pure_callback`: how the tests reach it through the public op, also under jit, vmap and grad.
"""

import functools
import os
import threading
from typing import Any

import jax
import numpy as np

_INTERPRETER_LOCK = threading.Lock()  # Triton's interpreter is not thread-safe


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def call(
    kernel,
    *args,
    out_shape: jax.ShapeDtypeStruct | tuple[jax.ShapeDtypeStruct, ...],
    aliases: dict[int, int] | None = None,
    grid: tuple[int, int, int],
    num_warps: int,
    num_stages: int,
    compute_capability: int | None = None,
    **constants,
) -> Any:
    """Launches `kernel(*args, *outs, **constants)` over `grid`.

    Args:
      args: arrays and Python integers, in the kernel's order; the outputs' pointers follow them.
      out_shape: shape and dtype of the output, or of several.
      aliases: {argument: output} whose memory is the same; the kernel gets a pointer for each.
      compute_capability: of the GPU to compile for (90 for sm_90); None asks the device. Lowering for CUDA on a machine
        without a GPU needs it: tests replace this function by `functools.partial(call, compute_capability=90)`.
      constants: the kernel's tl.constexpr arguments.
    """
    if interpreting():
        return _interpret(kernel, args, out_shape, aliases or {}, grid, constants)
    import jax_triton

    # jax_triton 0.3.1 sets this to "" on import; a later ordinary Triton compile in this process would die of it.
    os.environ.pop("TRITON_CACHE_DIR", None)
    _lower_capturable()
    return jax_triton.triton_call(
        *args,
        kernel=kernel,
        out_shape=out_shape,
        input_output_aliases=aliases,
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        compute_capability=compute_capability,
        **constants,
    )


@functools.cache
def _lower_capturable() -> None:
    """Lowers jax_triton's calls to "triton_kernel_call_ffi" from here on.

    jax_triton 0.3.1 lowers to "triton_kernel_call", which XLA never puts into a command buffer; jaxlib registers the
    same launch as a typed call too, which it does. Only the operation's form differs: the packed launch is an attribute
    `opaque` and no string of its own (jax_triton 0.4.1 lowers so itself).
    """
    from jax.interpreters import mlir
    from jax_triton import triton_lib
    from jaxlib.mlir import ir

    lower = functools.partial(triton_lib.triton_kernel_call_lowering, triton_lib.get_cuda_backend)

    def lower_typed(ctx, *args, **parameters):
        results: Any = lower(ctx, *args, **parameters)
        attributes = results[0].owner.attributes
        attributes["call_target_name"] = ir.StringAttr.get("triton_kernel_call_ffi")
        attributes["api_version"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 4)
        attributes["backend_config"] = ir.DictAttr.get({"opaque": attributes["backend_config"]})
        return results

    mlir.register_lowering(triton_lib.triton_kernel_call_p, lower_typed, platform="cuda")


def _interpret(kernel, args, out_shape, aliases, grid, constants):
    is_array = [not isinstance(a, int) for a in args]
    scalars = [a for a, array in zip(args, is_array, strict=True) if not array]
    out_shapes, tree = jax.tree.flatten(out_shape)

    def run(*arrays):
        remaining, numbers = iter(arrays), iter(scalars)
        with _INTERPRETER_LOCK:
            ordered = [_Pointer(np.array(next(remaining))) if array else next(numbers) for array in is_array]
            results = [_Pointer(np.zeros(out.shape, out.dtype)) for out in out_shapes]
            for argument, output in aliases.items():
                results[output] = ordered[argument]
            kernel[grid](*ordered, *results, **constants)
        return tree.unflatten([result.array for result in results])

    arrays = [a for a, array in zip(args, is_array, strict=True) if array]
    return jax.pure_callback(run, out_shape, *arrays, vmap_method="sequential")


class _Storage:
    """What Triton's interpreter asks of a torch storage, on a numpy array."""

    def __init__(self, array):
        self.array = array

    def data_ptr(self):
        return self.array.ctypes.data

    def cpu(self):
        return _Storage(self.array.copy())

    def copy_(self, other):
        self.array[...] = other.array


class _Pointer:
    """What Triton's interpreter asks of a torch tensor, on a numpy array (C order)."""

    def __init__(self, array):
        self.array = np.ascontiguousarray(array)
        self.dtype = str(array.dtype)
        self.shape = array.shape

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return _Storage(self.array)

    def storage_offset(self):
        return 0

    def size(self):
        return self.shape

    def stride(self):
        return tuple(s // self.array.itemsize for s in self.array.strides)

    def new_empty(self, _, device=None):
        return _Pointer(np.empty(0, self.array.dtype))

    def set_(self, storage, offset, size, stride):
        self.array, self.shape = storage.array, size
        return self
