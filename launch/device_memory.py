"""Whether a device can hold what a command is about to make: refused beforehand, in one line."""

import pathlib

import jax


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
