"""Whether a device can hold what a command is about to make: refused beforehand, in one line; and memory given back."""

import ctypes
import pathlib

import jax

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE_BYTES = 2**18


def free_bytes(device: jax.Device) -> int:  # pyright: ignore[reportInvalidTypeForm]: jax binds the class to a variable
    """Memory that this process may take on `device`: what its allocator grants, on a CPU what Linux has available."""
    if device.platform != "cpu":
        stats = device.memory_stats()
        return stats["bytes_limit"] - stats["bytes_in_use"]
    lines = pathlib.Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])


def require_memory(
    device: jax.Device,  # pyright: ignore[reportInvalidTypeForm]: jax binds the class to a variable
    needed_bytes: int,
    what: str,
) -> None:
    """Raises ValueError if the device cannot hold needed_bytes; `what` names the flags that ask for them."""
    free = free_bytes(device)
    if needed_bytes > free:
        raise ValueError(
            f"{what} needs about {needed_bytes / 1e9:.1f} GB of memory, {device.device_kind} has "
            f"{free / 1e9:.1f} GB free"
        )


def return_freed_memory() -> None:
    """Lets arrays that are freed go back to the system, where the C library is glibc: it would keep them.

    After one array of 100 MB is freed, glibc takes all below 32 MB from a heap, whose holes it does not return: reading
    a prompt of 512 tokens with SmolLM2 then leaves 280 MB resident in place of 50.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
