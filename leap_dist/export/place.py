"""The folder that exports go to: what may stand there, and what a killed export has left."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from leap_dist.errors import UserError, own_words
from leap_dist.files import alone, nearest, takes_files
from leap_dist.run_folder import CARD, CERTIFICATE, Run, job_in

PATIENCE = 1.0  # seconds for another export that is about to end


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
def taken(output: Path, kinds: Sequence[str]) -> Iterator[None]:
    """A block that exports `kinds` to `output`, which is made, and goes again where nothing comes of it.

    What a killed export left half written there is removed: not while another export is at work there, nor on a file
    system without locks, where that cannot be told. UserError where another export writes one of the kinds.
    """
    new = [place for place in (output, *output.parents) if not place.exists()]
    with written(output):
        output.mkdir(parents=True, exist_ok=True)
    place = os.open(output, os.O_RDONLY)
    try:
        _tidy(output, place)
        with ExitStack() as stack:
            for kind in sorted(set(kinds)):
                try:
                    stack.enter_context(alone(output / f".{kind}.lock", PATIENCE))
                except TimeoutError as error:
                    raise UserError(
                        f"--to {kind}: another process exports that kind to {output}; wait for it to end, or choose "
                        "another folder with --output"
                    ) from error
            yield
    finally:
        os.close(place)
        with suppress(OSError):  # something is in it
            for folder in new:
                folder.rmdir()


def _tidy(output: Path, place: int) -> None:
    """Remove what a killed export left, and hold the lock that says that one is at work. place: the open folder."""
    with suppress(OSError):  # held by another export, or no locks here
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in output.glob(".*.partial"):
            shutil.rmtree(left)
        for left in output.glob(".*.lock"):
            left.unlink()
    with suppress(OSError):
        fcntl.flock(place, fcntl.LOCK_SH)  # waits for one that tidies


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """A block that writes to `folder`: UserError for what the disk does not take."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, shutil.Error):
            why = error.args[0][0][2].partition(": '")[0]  # of the first file, without its paths
        else:
            why = getattr(error, "strerror", None) or own_words(error)
        raise UserError(
            f"--output: {folder} cannot be written: {why}; make room, or choose another folder with --output"
        ) from error
