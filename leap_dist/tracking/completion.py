"""What a run lacks that was killed once it had its certificate: its page, what MLflow has not taken, a tidy folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from leap_dist.errors import UserError
from leap_dist.files import is_free
from leap_dist.run_folder import CERTIFICATE, CHECKPOINTS, JOURNAL, RANKS, REFERENCE, REPORT, RESOLVED
from leap_dist.tracking.mlflow import sync
from leap_dist.tracking.report import has_report, write_report

LOCK = "lock"  # in RANKS, held by the process that writes to the folder


def is_incomplete(folder: Path) -> bool:
    """Whether a folder holds a finished run that lacks its page, whose records wait for MLflow, or with checkpoints."""
    finished = (folder / CERTIFICATE).is_file() and (folder / RESOLVED).is_file()
    return finished and (not has_report(folder) or (folder / JOURNAL).is_file() or bool(_left(folder)))


def complete(folder: Path, uri: str | None, tell: Callable[[str], None]) -> None:
    """Tidy the folder of a finished run, make its page, and send MLflow what waits; `tell` takes what was done.

    uri: of MLflow, as the job says. Raises UserError for what cannot be done now.
    """
    finished = f"the run in {folder} is finished"
    if (lock := folder / RANKS / LOCK).is_file() and _is_held(lock):
        raise UserError(f"{finished}, and another process is still writing to the folder; wait for it to end")
    for path in _left(folder):
        try:
            shutil.rmtree(path)
        except OSError as error:
            raise UserError(f"{finished}; {path} cannot be removed: {error.strerror or error}; remove it") from error
        tell(f"{finished}; {path.name} was left, and is removed now")
    if not has_report(folder):
        try:
            write_report(folder)
        except OSError as error:
            problem = f"{folder / REPORT} cannot be written: {error.strerror or error}"
            raise UserError(f"{problem}; make room, and start the same command again") from error
        tell(f"{finished}; its pictures and {REPORT} were missing, and are there now")
    if (folder / JOURNAL).is_file():
        tell(f"{finished}; {sync(folder, uri)}")


def complete_trial(folder: Path, uri: str | None, tell: Callable[[str], None]) -> None:
    """`complete`, where it is needed; `tell` takes why it cannot be done now. The sweep's next call tries again."""
    try:
        if is_incomplete(folder):
            complete(folder, uri, tell)
    except UserError as error:
        tell(f"{folder.name}: {error}")


def _is_held(lock: Path) -> bool:
    with lock.open("a") as file:
        return not is_free(file)


def _left(folder: Path) -> list[Path]:
    """What a run removes at its end; a link to another place stays, and so does what it leads to."""
    return [
        path for name in (CHECKPOINTS, REFERENCE, RANKS) if (path := folder / name).is_dir() and not path.is_symlink()
    ]
