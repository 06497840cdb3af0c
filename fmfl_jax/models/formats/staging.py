"""Folders that appear whole or not at all."""

import contextlib
import fnmatch
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def staged_directory(path: str | os.PathLike, *, owned: Sequence[str]) -> Iterator[pathlib.Path]:
    """Gives a temporary folder beside `path` that is renamed to `path` at the end, or removed when something fails.

    A folder that is already there is replaced if all its files match the patterns `owned`, so that a second run can
    write its result again and no one's other files are lost.

    Raises:
      FileExistsError: `path` is a file, or a folder with other files.
      OSError: writing failed (a full disk); the message names `path`.
    """
    path = pathlib.Path(os.path.abspath(path))
    _check_replaceable(path, owned)
    staging = path.with_name(f".{path.name}.{os.getpid()}.partial")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
        if path.exists():
            path.rename(replaced)
        staging.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as e:
        raise OSError(e.errno, f"{path}: could not be saved ({e.strerror or e}); nothing was left there") from e
    finally:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        shutil.rmtree(staging, ignore_errors=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a small file through to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _check_replaceable(path: pathlib.Path, owned: Sequence[str]) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise FileExistsError(f"{path}: expected a folder to write to, found a file")
    for file in path.iterdir():
        if not any(fnmatch.fnmatchcase(file.name, pattern) for pattern in owned):
            raise FileExistsError(f"{path}: holds other files ({file.name}): expected a new or empty folder")
