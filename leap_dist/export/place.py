"""The folder that exports go to: what may stand there, and what a killed export has left."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from leap_dist.errors import UserError
from leap_dist.files import nearest, takes_files
from leap_dist.run_folder import CARD, CERTIFICATE, Run, job_in


def refuse_other_run(output: Path, run: Run) -> None:
    """UserError if `output` is the folder of another run than the one that is exported."""
    is_run = (output / CERTIFICATE).exists() or job_in(output) is not None
    if is_run and not output.samefile(run.folder):
        raise UserError(
            f"--output: got {output}, which holds another run than {run.folder}; allowed: a folder for exports alone, "
            f"or none given; choose another one, such as {run.folder / 'export'}"
        )


def refuse_foreign(folder: Path) -> None:
    """UserError if an export cannot go to `folder`: something stands there that is no export."""
    if folder.exists() and not (folder / CARD).is_file():
        raise UserError(f"--output: {folder} exists and is not an export; remove it, or choose another folder")
    place = nearest(folder.absolute().parent)
    if not takes_files(place):
        raise UserError(f"--output: {folder} cannot be made: {place} is not a folder that can be written to")


@contextmanager
def tidied(output: Path) -> Iterator[None]:
    """A block that exports to `output`, which is made. What a killed export left half written there is removed.

    Not while another export is at work there, nor on a file system without locks, where that cannot be told.
    """
    output.mkdir(parents=True, exist_ok=True)
    place = os.open(output, os.O_RDONLY)
    try:
        with suppress(OSError):  # held by another export, or no locks here
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in output.glob(".*.partial"):
                shutil.rmtree(left)
        with suppress(OSError):
            fcntl.flock(place, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(place)
