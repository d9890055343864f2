"""What a run lacks that was killed once it had its certificate: its page, and what MLflow has not taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from leap_dist.errors import UserError
from leap_dist.run_folder import CERTIFICATE, JOURNAL, REPORT, RESOLVED
from leap_dist.tracking.mlflow import sync
from leap_dist.tracking.report import has_report, write_report


def is_incomplete(folder: Path) -> bool:
    """Whether a folder holds a finished run that lacks its page, or whose records wait for MLflow."""
    finished = (folder / CERTIFICATE).is_file() and (folder / RESOLVED).is_file()
    return finished and (not has_report(folder) or (folder / JOURNAL).is_file())


def complete(folder: Path, uri: str | None, tell: Callable[[str], None]) -> None:
    """Make the page of a finished run, and send MLflow what waits; `tell` takes what was done, in words.

    uri: of MLflow, as the job says. Raises UserError for what cannot be done now.
    """
    if not has_report(folder):
        try:
            write_report(folder)
        except OSError as error:
            problem = f"{folder / REPORT} cannot be written: {error.strerror or error}"
            raise UserError(f"{problem}; make room, and start the same command again") from error
        tell(f"the run in {folder} is finished; its pictures and {REPORT} were missing, and are there now")
    if (folder / JOURNAL).is_file():
        tell(f"the run in {folder} is finished; {sync(folder, uri)}")
