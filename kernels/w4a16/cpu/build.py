"""Compiles the CPU kernels with the machine's C++ compiler at first use, and keeps the library in the user's cache.

The library is looked up by a hash of everything that could make an old one wrong: sources, flags, compiler, jaxlib (its
FFI headers) and the CPU's instruction sets. It holds code for several instruction sets and chooses while running, so
even one that comes from another machine executes nothing that this CPU lacks.
"""

import concurrent.futures
import ctypes
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile

import jax
import jaxlib.version

SOURCES = pathlib.Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
AVX512_FLAGS = (*AVX2_FLAGS, *(f"-mavx512{s}" for s in ("f", "bw", "vl", "vnni")))
AMX_FLAGS = (*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16")  # amx.cc is empty where a compiler lacks them
UNITS = {  # machine -> source -> the flags that only this source may have
    "x86_64": {"avx2.cc": AVX2_FLAGS, "avx512.cc": AVX512_FLAGS, "amx.cc": AMX_FLAGS},
    "aarch64": {"neon.cc": ("-march=armv8.2-a+dotprod",)},
}
UNITS |= {"AMD64": UNITS["x86_64"], "arm64": UNITS["aarch64"]}  # other systems' names of the same two
# XLA custom calls of the library
TARGETS = ("w4a16_forward", "w4a16_forward_layer", "w4a16_backward", "w4a16_attend", "float_product")
TIMEOUT_S = 600.0


class BuildError(Exception):
    """Why there is no library, in one line."""


def cache_dir() -> pathlib.Path:
    """$XDG_CACHE_HOME/fmfl_jax/w4a16, ~/.cache where that is not set."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "fmfl_jax" / "w4a16"


def compiler() -> str:
    """$CXX, or the first of c++, g++ and clang++ that is installed.

    Raises:
      BuildError: there is none.
    """
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C++ compiler ({os.environ.get('CXX') or 'c++, g++ or clang++'}) is installed")


def cpu_flags() -> str:
    """The instruction sets of this CPU as the system names them; its name where the system says no more."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = [line.partition(":")[2].strip() for line in lines if line.startswith(("flags", "Features"))]
    return flags[0] if flags else platform.processor()


def key(cxx: str) -> str:
    """The hash that a library must have been built under to be used here."""
    version = _run([cxx, "--version"])
    parts = [*FLAGS, repr(UNITS), cxx, version, jaxlib.version.__version__, platform.machine(), cpu_flags()]
    for path in sorted(SOURCES.glob("*.cc")) + sorted(SOURCES.glob("*.h")):
        parts += [path.name, path.read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def library() -> pathlib.Path:
    """The path of the library for this machine, built if it is not in the cache yet.

    Raises:
      BuildError: this machine's kind has no kernels, no compiler, one that fails, or a cache that cannot be written.
    """
    if platform.machine() not in UNITS:
        raise BuildError(f"there are no kernels for {platform.machine()}")
    cxx = compiler()
    path = cache_dir() / f"{key(cxx)}.so"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            built = pathlib.Path(scratch) / path.name
            _compile(cxx, pathlib.Path(scratch), built)
            os.replace(built, path)  # atomic: another process sees no library or a whole one
    except OSError as error:
        raise BuildError(f"the cache cannot be written ({error})") from error
    return path


def load() -> ctypes.CDLL:
    """The library, loaded.

    Raises:
      BuildError: as `library`, or it does not load, or this CPU lacks what every one of its kernels needs.
    """
    path = library()
    try:
        loaded = ctypes.CDLL(str(path))
        for name in TARGETS:
            getattr(loaded, name)  # an AttributeError where it lacks one
        runs = loaded.w4a16_runs_here(b"best")
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} does not load ({error}); remove it to build it again") from error
    if not runs:
        raise BuildError("this CPU has neither AVX2 (x86-64) nor the dot product (Arm)")
    return loaded


def _compile(cxx: str, scratch: pathlib.Path, out: pathlib.Path) -> None:
    print(f"w4a16: compiling the CPU kernels, once for this machine, into {cache_dir()}", file=sys.stderr, flush=True)
    units = {"ffi.cc": ("-isystem", jax.ffi.include_dir()), **UNITS[platform.machine()]}
    if "amx.cc" in units and not _knows(cxx, AMX_FLAGS):
        units["amx.cc"] = ()
    objects = {name: str(scratch / f"{name}.o") for name in units}
    commands = [[cxx, *FLAGS, *own, "-c", str(SOURCES / name), "-o", objects[name]] for name, own in units.items()]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(_run, commands))
    _run([cxx, "-shared", *objects.values(), "-o", str(out)])


def _knows(cxx: str, flags: tuple[str, ...]) -> bool:
    try:
        _run([cxx, *flags, "-x", "c++", "-fsyntax-only", os.devnull])
    except BuildError:
        return False
    return True


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run ({error})") from error
    if done.returncode:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()
        first = next((line for line in said if "error" in line), said[0])
        raise BuildError(f"{command[0]} fails: {first}")
    return done.stdout
