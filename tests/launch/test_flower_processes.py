"""What is said of a program of Flower's that ended."""

import sys

import pytest

from launch.flower_processes import free_port, reason, running, size_of, wait_for_port

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
