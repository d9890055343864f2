"""Signals that schedulers send to a sweep: it ends as on Ctrl-C, and its records say so."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from leap_dist.stopping import HEEDED
from leap_dist.sweep.stop import heed_signals
from tests.sweep.jobs import JOB, sweep_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in HEEDED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", HEEDED)
def test_signals_that_come_together_are_one_request(number: signal.Signals, handlers: None) -> None:
    heed_signals()
    with pytest.raises(KeyboardInterrupt, match=number.name):
        os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)  # as `timeout` sends one to the process, and another to its group


def test_in_another_thread_signals_are_left_as_they_are(handlers: None) -> None:
    thread = threading.Thread(target=heed_signals)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "has_ray"),
    [("SIGTERM", False), *(pytest.param(name, True, marks=pytest.mark.long) for name in ("SIGTERM", "SIGUSR1"))],
)
def test_a_scheduler_stops_a_sweep_as_ctrl_c_does(name: str, has_ray: bool, tmp_path: Path, empty_store: Path) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    job = {
        "train": {**JOB["train"], "max_steps": 10**6},
        "tracking": {"mlflow_uri": f"sqlite:///{tmp_path}/mlflow.db"},
    }
    file, out, told = sweep_file(tmp_path, job, vary={"leap.target": [0.5]}), tmp_path / "out", tmp_path / "told.txt"
    if not has_ray:
        (tmp_path / "without" / "ray").mkdir(parents=True)  # a package without Tune
        (tmp_path / "without" / "ray" / "__init__.py").touch()
    path = os.pathsep.join([str(tmp_path / "without"), str(ROOT)])
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), "--config", str(file), "--output", str(out)]
    with told.open("w") as log:
        sweep = subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 300
        while not list(out.glob("0.5/checkpoints/step-*/manifest.json")):
            assert sweep.poll() is None and time.monotonic() < deadline, told.read_text()
            time.sleep(0.05)
        sweep.send_signal(signal.Signals[name])
        assert sweep.wait(timeout=120) == 3, told.read_text()
    finally:
        sweep.kill()
    text = told.read_text()
    assert text.splitlines()[-1] == "stopped; the same command resumes it" and "Traceback" not in text, text
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
        runs = store.execute("SELECT name, status, end_time > 0 FROM runs ORDER BY name").fetchall()
    assert runs == [("0.5", "KILLED", 1), ("sweep", "KILLED", 1)]
