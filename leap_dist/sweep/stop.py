"""How a sweep is cut off: by what schedulers send as by Ctrl-C, and so that no trial is left that seems to run."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from leap_dist.errors import UserError
from leap_dist.files import is_free
from leap_dist.run_folder import CERTIFICATE, JOURNAL
from leap_dist.secrets import hide_secrets
from leap_dist.stopping import HEEDED, Raises
from leap_dist.sweep.line import Line
from leap_dist.tracking.delivery import DELIVERIES
from leap_dist.tracking.journal import Journal
from leap_dist.tracking.records import now
from leap_dist.tracking.store import connect, held_back, in_time, starting, user_errors

POLL, PATIENCE = 0.1, 15.0  # seconds: between two looks, and for the ranks of a trial to be gone


def heed_signals() -> None:
    """Let HEEDED signals end this process as Ctrl-C does; called anew after what installs handlers of its own."""
    if threading.current_thread() is threading.main_thread():
        stop = Raises(KeyboardInterrupt)
        for number in HEEDED:
            signal.signal(number, stop)


@contextmanager
def closing_records(line: Line) -> Iterator[None]:
    """A block that leaves the ranks of a sweep; MLflow learns then which trials were killed with them."""
    try:
        yield
    finally:
        deadline = time.monotonic() + PATIENCE
        for trial in line.running:
            try:
                _close(line.folder / trial.name, trial.config.tracking.mlflow_uri, deadline)
            except UserError as error:
                line.board.tell(f"{trial.name}: {error}")


def _close(folder: Path, uri: str | None, deadline: float) -> None:
    """Record that a trial was killed, unless it has recorded its end, or needs nothing but to be completed.

    What else waits for MLflow may take longer than a scheduler does: the trial sends it when it is resumed.
    """
    path = folder / JOURNAL
    if uri is None or not path.is_file() or (folder / CERTIFICATE).is_file():
        return
    with path.open("a") as file:
        while not is_free(file) and time.monotonic() < deadline:
            time.sleep(POLL)
    journal = Journal(folder)
    killed = {"status": "KILLED", "time": now()}
    run_id, was_running = journal.run.get("run_id"), journal.run.get("status") == "RUNNING"
    if was_running:
        journal.add("status", **killed)
        journal.describe(status="KILLED")
    journal.close(remove=False)
    if was_running and run_id:
        problem = f"MLflow at {hide_secrets(uri)} still says that it is running"
        _, _, deliver = DELIVERIES["status"]
        with held_back(), starting(), user_errors(uri, problem, "resume the sweep, which mends that"):
            in_time(uri, lambda: deliver(connect(uri), run_id, [killed], folder))
