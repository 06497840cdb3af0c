"""What every command shares: one-line errors, Ctrl-C, quiet libraries, finite numbers."""

import math
import os
import re
import sys
import warnings

import jax
from absl import app, flags, logging

from launch import cluster

_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error arose instead of one line.")


def run(main, *flag_modules, commands: tuple[str, ...] = (), takes_words: bool = False) -> None:
    """Runs main() after the flags are parsed. flag_modules: modules whose flags --helpshort lists too, with those here.
    commands: words of which one is to stand before the flags; main(word) then. takes_words: main(words) gets what
    stands after "--".

    A mistake of the user's (ValueError, OSError) ends as one line on stderr and exit status 2, Ctrl-C as one line and
    status 130; anything else is a defect and keeps its traceback.
    """

    def guarded(argv):
        words = argv[1:]
        if commands and words[:1] not in [[command] for command in commands]:
            return _fail(f"expected one of {', '.join(commands)} before the options, see --helpshort")
        extra = words[bool(commands) :]
        if extra and not takes_words:
            return _fail(f"unexpected argument {extra[0]!r}: options begin with --, see --helpshort")
        logging.set_verbosity(logging.ERROR)  # orbax reports every file it writes
        warnings.showwarning = _show_warning
        try:
            refuse_non_finite_flags()
            cluster.join_cluster()
            main(*([words] if takes_words else words))
        except KeyboardInterrupt:
            print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
            _leave(130)
        except (ValueError, OSError) as e:
            if _TRACEBACK.value:
                raise
            _leave(_fail(with_flags(" ".join(str(e).split()))))
        return 0

    for module in (*flag_modules, cluster, sys.modules[__name__]):
        for flag in flags.FLAGS.get_key_flags_for_module(module):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # the name absl knows the command by
    app.run(guarded)


def refuse_non_finite_flags() -> None:
    """Raises ValueError, naming the flag, where a number given to any flag is NaN or infinite. (A default may be: no
    limit.)"""
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        values = flag.value if isinstance(flag.value, list | tuple) else (flag.value,)
        for number in values if flag.present else ():
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"--{name}={number}: expected a finite number")


def say(text: str) -> None:
    """Prints a line, from the first of several processes only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def with_flags(message: str) -> str:
    """A library's message with flags in place of fields: --name=value for name=value, where there is such a flag."""

    def flag(match):
        return f"--{match.group()}" if match.group(1) in flags.FLAGS else match.group()

    return re.sub(r"(?<![-\w])([a-z][a-z_]*)(?==)", flag, message)


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
