"""Servers that are no MLflow server, or a broken one: one message, soon, and credentials stay with the first one."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from leap_dist.config.sections import TrackingConfig
from leap_dist.errors import UserError
from leap_dist.tracking import store
from leap_dist.tracking.mlflow import Tracker

pytestmark = pytest.mark.slow

PASSWORD = "password-of-me"


class Strange(http.server.ThreadingHTTPServer):
    """Answers every request in the same way, and notes which headers it got."""

    daemon_threads = True

    def __init__(self, status: int = 200, body: bytes = b"", pause: float = 0.0, to: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.status, self.body, self.pause, self.to = status, body, pause, to
        self.heard: list[str] = []


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Strange

    def do_GET(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.heard.append(f"{self.path} {dict(self.headers)} {sent!r}")
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        if self.server.to:
            self.send_header("Location", self.server.to + self.path)
        self.end_headers()
        step = 1 if self.server.pause else max(len(self.server.body), 1)
        with suppress(OSError):
            for start in range(0, len(self.server.body), step):
                self.wfile.write(self.server.body[start : start + step])
                time.sleep(self.server.pause)

    do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        """Nothing on the console."""


@contextmanager
def running(server: Strange) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def refused(address: str, folder: Path) -> str:
    """What a run is told that begins there."""
    config = TrackingConfig(mlflow_uri=f"http://me:{PASSWORD}@{address}")
    with pytest.raises(UserError) as caught, Tracker(config, {"a": 1}, True, folder=folder):
        pass
    assert not list(folder.iterdir()) and PASSWORD not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, b"<html>please log in</html>", "the response body was not in a valid JSON format"),
        (200, b"\xff\xfe{{{", "the response body was not in a valid JSON format"),
        (200, b"[" * 1_000_000, "the response body was not in a valid JSON format"),
        (200, b"", "it gave the run no id: this is not an MLflow server"),
        (200, json.dumps({"experiment": 5, "run": [], "experiment_id": {}}).encode(), "does not take the run: "),
        (500, b"<html>\x1b[31m out of order</html>", "too many 500 error responses"),
        (403, b"<html>no</html>", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_what_is_no_mlflow_server_is_one_message(tmp_path: Path, status: int, body: bytes, said: str) -> None:
    with running(Strange(status, body)) as address:
        assert said in refused(address, tmp_path)


def test_an_answer_that_comes_byte_by_byte_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LONGEST_START", 2.0)
    with running(Strange(body=b" " * 100, pause=0.2)) as address:
        begun = time.monotonic()
        assert "it has not answered within 2 seconds" in refused(address, tmp_path)
        assert time.monotonic() - begun < 15


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_credentials_do_not_follow_to_another_host(tmp_path: Path, status: int) -> None:
    with running(other := Strange(body=b"<html>")) as elsewhere:
        port = elsewhere.rpartition(":")[2]
        with running(first := Strange(status, to=f"http://localhost:{port}")) as address:
            refused(address, tmp_path)
    assert "Authorization" in first.heard[0] and other.heard
    assert not [text for text in other.heard if "uthorization" in text or PASSWORD in text]
