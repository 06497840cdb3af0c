"""What every command shares: one-line errors, Ctrl-C, quiet libraries, and joining a cluster."""

import os
import sys
import warnings

import jax
from absl import app, flags, logging

_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "host:port of process 0, to run as one of several processes; 'auto' asks the cluster (SLURM, "
    "TPU pods, Open MPI, Kubernetes).",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Number of processes, with --coordinator=host:port.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "This process's number, from 0, with --coordinator=host:port.", lower_bound=0
)
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error arose instead of one line.")


def run(main, *flag_modules) -> None:
    """Runs main() after the flags are parsed. flag_modules: modules whose flags --helpshort lists too, with those here.

    A mistake of the user's (ValueError, OSError) ends as one line on stderr and exit status 2, Ctrl-C as one line and
    status 130; anything else is a defect and keeps its traceback.
    """

    def guarded(argv):
        if len(argv) > 1:
            return _fail(f"unexpected argument {argv[1]!r}: options begin with --, see --helpshort")
        logging.set_verbosity(logging.ERROR)  # orbax reports every file it writes
        warnings.showwarning = _show_warning
        try:
            join_cluster()
            main()
        except KeyboardInterrupt:
            print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
            _leave(130)
        except (ValueError, OSError) as e:
            if _TRACEBACK.value:
                raise
            _leave(_fail(" ".join(str(e).split())))
        return 0

    for module in (*flag_modules, sys.modules[__name__]):
        for flag in flags.FLAGS.get_key_flags_for_module(module):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # the name absl knows the command by
    app.run(guarded)


def join_cluster() -> None:
    """jax.distributed, where --coordinator asks for it."""
    if _COORDINATOR.value is None:
        if _NUM_PROCESSES.value is not None or _PROCESS_ID.value is not None:
            raise ValueError("--num_processes and --process_id need --coordinator=host:port")
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # several CPU processes; ignored on accelerators
    if _COORDINATOR.value == "auto":
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)


def say(text: str) -> None:
    """Prints a line, from the first of several processes only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def _leave(status: int) -> None:
    """Ends the process at once: what checkpointing threads do while Python shuts down may abort it instead."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """A line, where Python writes the place in the code too."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
