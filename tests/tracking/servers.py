"""A real `mlflow server` in a process of its own, which can be killed and started again at the same address."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType

DATABASE = "backend.db"
STARTS_IN = 120.0  # seconds, at most


class Server:
    """Its database, files and log are in `folder`. A context manager: it runs inside."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start it as a user would, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += [
            "--workers",
            "1",
            "--backend-store-uri",
            f"sqlite:///{DATABASE}",
            "--artifacts-destination",
            "files",
        ]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = os.environ | {"PATH": path, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                command, cwd=self._folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + STARTS_IN
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), opener.open(f"{self.address}/health", timeout=5):
                return
            time.sleep(0.2)
        self.kill()
        raise RuntimeError(f"the MLflow server did not come up:\n{(self._folder / 'server.log').read_text()}")

    def kill(self) -> None:
        """kill -9: the server and its workers, which are in a session of their own."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
