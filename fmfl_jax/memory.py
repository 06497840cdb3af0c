"""The process's own memory: what is freed goes back to the system. glibc would keep it; others are left alone."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h
_LARGE_BYTES = 2**18


def return_freed_memory() -> None:
    """Gives the system back what was freed until now.

    Some 300 MB once XLA has compiled a model of 135 M parameters, on top of which a round's temporaries would come.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_freed_memory() -> None:
    """From now on what is freed stays, until `return_freed_memory`.

    A round's temporaries, some 400 MB with SmolLM2, would else be new pages in every round: 6 to 10 per cent of its
    time.
    """
    _set(_M_MMAP_MAX, 0)
    _set(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_large_arrays() -> None:
    """From now on, arrays that are freed go back by themselves.

    After one array of 100 MB is freed, glibc takes all below 32 MB from a heap, whose holes it does not return: reading
    a prompt of 512 tokens with SmolLM2 then leaves 280 MB resident in place of 50.
    """
    _set(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def _set(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
