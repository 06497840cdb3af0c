"""Joining a cluster: addresses, and what a process says while it waits for one that does not come."""

import socket
import threading
import time

import pytest

from launch.cluster import awaited_processes, host_and_port, time_limit


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":1234", "localhost:1x", "localhost:0", "h:65536"])
def test_an_address_without_a_port_is_refused(address):
    with pytest.raises(ValueError, match=f"--coordinator={address}: expected host:port"):
        host_and_port(address)
    assert host_and_port("node-3:1234") == ("node-3", 1234) and host_and_port("[::1]:80") == ("::1", 80)


def test_who_is_awaited():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert awaited_processes("127.0.0.1", port, 1, 3) == f"the other 2 of 3 processes to join at 127.0.0.1:{port}"
    assert awaited_processes("127.0.0.1", port, 1, 3) == f"process 0, which does not answer at 127.0.0.1:{port}"


def test_a_line_now_and_then_and_the_end(capfd):
    left = threading.Event()
    statuses = []
    with time_limit(lambda: "process 0", 0.25, every_s=0.1, leave=lambda status: (statuses.append(status), left.set())):
        assert left.wait(10)
    lines = capfd.readouterr().err.splitlines()
    assert statuses == [2]
    assert lines == [
        "waiting for process 0: 0.1 of 0.25 s",
        "waiting for process 0: 0.2 of 0.25 s",
        "error: --join_timeout_s=0.25: waited for process 0",
    ]
    with time_limit(lambda: "process 0", 0.2, every_s=0.1, leave=statuses.append):
        pass
    time.sleep(0.3)
    assert statuses == [2] and not capfd.readouterr().err
