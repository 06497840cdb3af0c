"""What is said of a program of Flower's that ended, and that a ServerApp ends with the command that started it."""

import pathlib
import subprocess
import sys

import pytest

from launch.flower_processes import free_port, held, reason, running, size_of, wait_for_port

ROOT = pathlib.Path(__file__).parents[2]
OLD = "ERROR of yesterday\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("INFO start\n\x1b[91mERROR\x1b[0m [uvicorn.error] no such name\nINFO [uvicorn.error] done.\n", "no such name"),
        ("INFO start\n[code: 2004] Failed to activate.\nbye\n", "Failed to activate"),
        ("Path argument does not point to a file.\n", "Path argument"),
        ("", "it wrote nothing"),
    ],
)
def test_the_reason_is_the_last_error_of_this_time(text, says, tmp_path):
    log = tmp_path / "program.log"
    assert size_of(log) == 0
    log.write_text(OLD + text, encoding="utf-8")
    found = reason(log, len(OLD))
    assert says in found and "\x1b" not in found and "yesterday" not in found


def test_a_program_that_ends_before_its_port_is_open_is_named_with_its_error(tmp_path):
    log, port = tmp_path / "superlink.log", free_port()
    command = [sys.executable, "-c", "import sys; sys.exit('ValueError: no such host')"]
    with running(command, {}, log) as process, pytest.raises(ValueError, match="superlink ended: ValueError: no such"):
        wait_for_port("127.0.0.1", port, process, log, 0)


def test_a_process_ends_with_the_holder_of_a_lock_and_not_before(tmp_path):
    lock = tmp_path / "lock"
    code = (
        "import pathlib, sys, time; from launch.flower_processes import end_when_free; "
        "end_when_free(pathlib.Path(sys.argv[1])); print('on', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(lock)]
    with held(lock):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
        assert process.stdout is not None and process.stdout.readline() == b"on\n"
        with pytest.raises(BlockingIOError), held(lock):
            pass
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
    assert process.wait(timeout=30) == 1
    process.stdout.close()
    with held(lock):  # free for the next
        pass
