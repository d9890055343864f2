"""The folder that exports go to: what may stand there, and what a killed export has left."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from leap_dist.errors import UserError, own_words
from leap_dist.files import alone, nearest, takes_files
from leap_dist.run_folder import CARD, CERTIFICATE, Run, job_in

PATIENCE = 1.0  # seconds for another export that is about to end
SCRATCH = ".vocabulary.", ".partial"
"""How the name of the folder begins and ends that a model with fewer tokens lies in while it is exported."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


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
def taken(output: Path, kinds: Sequence[str], known: Iterable[str]) -> Iterator[None]:
    """A block that exports `kinds`, of all `known`, to `output`, which is made, and goes where nothing comes of it.

    What a killed export left half written there is removed: not while another export is at work there, nor on a file
    system without locks, where that cannot be told. UserError where another export writes one of the kinds.
    """
    new = [place for place in (output, *output.parents) if not place.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(output, error.strerror or own_words(error)) from error
    place = os.open(output, os.O_RDONLY)
    try:
        _tidy(output, place, known)
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


def _tidy(output: Path, place: int, known: Iterable[str]) -> None:
    """Remove what a killed export left, and hold the lock that says that one is at work. place: the open folder."""
    names = [name for kind in known for name in (f".{kind}.partial", f"..{kind}.partial.partial")]  # of both stages
    with suppress(OSError):  # held by another export, or no locks here
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in [*map(output.joinpath, names), *output.glob("*".join(SCRATCH))]:
            if left.is_dir():
                shutil.rmtree(left)
        for kind in known:
            (output / f".{kind}.lock").unlink(missing_ok=True)
    with suppress(OSError):
        fcntl.flock(place, fcntl.LOCK_SH)  # waits for one that tidies


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """A block that writes to `folder`: UserError for what the disk does not take, and for a file that is not copied."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if why := _full(error, folder):
            raise _unwritable(folder, why) from error
        if isinstance(error, shutil.Error):  # of several files, the first
            source, _, said = error.args[0][0]
            raise UserError(f"{source}: cannot be copied: {said}; restore it, or take it out") from error
        raise


def _unwritable(folder: Path, why: str) -> UserError:
    return UserError(f"--output: {folder} cannot be written: {why}; make room, or choose another folder with --output")


def _full(error: Exception, folder: Path) -> str:
    """Why a disk or folder takes nothing; "" for another fault. The numbers are in the words where libraries copy."""
    number = error.errno if isinstance(error, OSError) and error.errno else 0
    if found := re.search(r"(?:Errno|os error) (\d+)", str(error)):
        number = int(found[1])
    name = getattr(error, "filename", None)
    own = isinstance(name, str | Path) and (folder.is_relative_to(name) or Path(name).is_relative_to(folder.parent))
    return os.strerror(number) if number in FULL or (own and number in (errno.EACCES, errno.EPERM)) else ""
