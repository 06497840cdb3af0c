"""Over a real socket: resumed, verified, and a server that sends something else is not believed."""

import contextlib
import http.server
import threading

import pytest

from fmfl_jax.transport.weights.container import Container, DamagedChunkError
from fmfl_jax.transport.weights.http import fetch, make_server
from tests.transport.weights.models import PUBLIC, contents, files_of, packed


@pytest.fixture(scope="module")
def container(tmp_path_factory):
    return Container(packed(tmp_path_factory.mktemp("packed") / "m.fmw", files_of()), PUBLIC)


@contextlib.contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Stop(Exception):
    pass


def test_fetched_in_two_goes(tmp_path, container):
    def stop(manifest, part):
        if part.name == "layers.0.w":
            raise Stop

    with running(make_server(container, "127.0.0.1", 0)) as url:
        with pytest.raises(Stop):
            fetch(url, PUBLIC, tmp_path / "m", on_part=stop)
        assert not (tmp_path / "m").exists()
        done = fetch(url, PUBLIC, tmp_path / "m")
    assert contents(tmp_path / "m") == files_of()
    assert done.resumed_bytes > 0 and done.resumed_bytes + done.received_bytes == container.manifest.coded_bytes


class Liar(http.server.BaseHTTPRequestHandler):
    """Answers ranges as class attributes say."""

    protocol_version = "HTTP/1.1"
    data = b""
    change = staticmethod(lambda body: body)
    status, length, total = 206, None, None
    asked = 0

    def do_GET(self):
        begin, end = (int(x) for x in self.headers["Range"].removeprefix("bytes=").split("-"))
        type(self).asked += 1
        body = self.data[begin : end + 1]
        body = self.change(body) if begin > 12 and begin >= self.head else body
        self.send_response(self.status)
        self.send_header("Content-Range", f"bytes {begin}-{end}/{self.total or len(self.data)}")
        self.send_header("Content-Length", str(self.length or len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    "lies, error, why",
    [
        ({"change": staticmethod(lambda body: body + b"more")}, ValueError, "sends more than the"),
        ({"change": staticmethod(lambda body: b"\0" * len(body))}, DamagedChunkError, "chunk 0 of .* is damaged"),
        ({"change": staticmethod(lambda body: body[:1000]), "attempts": 400}, None, ""),
        ({"change": staticmethod(lambda body: b"")}, ConnectionError, "ended after 0 of"),
        ({"status": 200}, ValueError, "answers 200 where a range"),
        ({"status": 503}, ConnectionError, "status 503"),
        ({"total": 10**9}, ValueError, "another file, or too long"),
    ],
)
def test_servers_that_send_something_else(tmp_path, container, monkeypatch, lies, error, why):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    attempts = lies.pop("attempts", 3) if "attempts" in lies else 3
    kind = type("Kind", (Liar,), {"data": container.path.read_bytes(), "head": len(container.head), "asked": 0} | lies)
    with running(http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)) as url:
        if error is None:  # a thousand bytes a connection: every one makes progress
            fetch(url, PUBLIC, tmp_path / "m", attempts=attempts)
            assert contents(tmp_path / "m") == files_of()
            assert kind.asked > container.manifest.coded_bytes // 1000
        else:
            with pytest.raises(error, match=why):
                fetch(url, PUBLIC, tmp_path / "m", attempts=attempts)
            assert kind.asked < 10
            assert not (tmp_path / "m").exists()


def test_nobody_there_and_what_is_no_url(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(ConnectionError, match=r"refused.*\(3 attempts\)"):
        fetch("http://127.0.0.1:1/", PUBLIC, tmp_path / "m", attempts=3)
    with pytest.raises(ValueError, match="expected http"):
        fetch("ftp://host/", PUBLIC, tmp_path / "m")
