"""The process's own memory: what the compiler leaves behind, given back before the work begins."""

import ctypes


def return_freed_memory() -> None:
    """Gives the system back what was freed.

    glibc keeps it otherwise: some 300 MB once XLA has compiled a model of 135 M parameters, on top of which a round's
    temporaries would come. Nothing happens under another C library.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
