"""Files and folders that are complete, or not there; and where the package's own are."""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any

LOOK = 0.05  # seconds between two looks at a lock


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """The path beside `folder` that the block makes a folder of; it gets its name when the block ends well.

    An older folder of that name is replaced; it stays where the block fails.
    """
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def user_path(text: str) -> Path:
    """A path as a user writes it: "~" and "~name" are home folders, if there are such."""
    return Path(os.path.expanduser(text))


def nearest(path: Path) -> Path:
    """The path itself if it is there, else the nearest one above it that is."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def takes_files(place: Path) -> bool:
    """Whether it is a folder that can be written to."""
    return place.is_dir() and os.access(place, os.W_OK)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path beside `path` that the block writes a file to; it gets its name when the block ends well.

    Whenever this is cut off, `path` is the old file or the new one; of one that fails nothing stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """The file is the old one or the new one, whenever this is cut off."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def warn_if_unwritten(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """A block that writes what only reports of finished work: where the disk does not take it, that is said."""
    try:
        yield
    except OSError as error:
        say(
            f"warning: {path} could not be written: {error.strerror or error}; make room, and run the "
            "same command again to make it"
        )


def append(file: FileIO, data: bytes) -> None:
    """Write at the end of an open file: all of it, or nothing where OSError is raised."""
    end = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        file.truncate(end)
        raise


def drop_torn_line(path: Path) -> None:
    """Cut off a last line that a kill or a full disk left without its end, so that the next one is a line of its own.

    Raises OSError where the file cannot be changed.
    """
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


class Lines:
    """Lines at the end of a file. Those that it does not take, on a full disk, wait here and go first the next time.

    A last line without its end, which a kill or an editor has left, gets one first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting = b""

    def __len__(self) -> int:
        """The lines that wait."""
        return self._waiting.count(b"\n")

    def add(self, line: str) -> None:
        """Raises OSError where the line has to wait."""
        self._waiting += line.encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Write what waits; raises OSError if it still has to."""
        if self._waiting:
            with FileIO(self._path, "a+") as file:
                whole = not file.seek(0, os.SEEK_END) or (file.seek(-1, os.SEEK_END) >= 0 and file.read(1) == b"\n")
                append(file, self._waiting if whole else b"\n" + self._waiting)
            self._waiting = b""


def is_free(file: IO[Any]) -> bool:
    """Take the lock of an open file, until it is closed or this process ends; False: another process has it.

    On a file system without locks everybody gets it.
    """
    return _lock(file) is not False


def _lock(file: IO[Any]) -> bool | None:
    """None: the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def alone(path: Path, patience: float) -> Iterator[None]:
    """Wait until no other process is in a block of this path, at most `patience` seconds; then TimeoutError.

    The file `path` is there while one is in the block. One that a killed process has left keeps nobody out. Where no
    file can be made or locked there, one in the machine's own folder for such files does: enough for one machine.
    """
    deadline = time.monotonic() + patience
    while (file := _entered(path)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"another process has held {path} for {patience:.0f} seconds; wait for it, or end it")
        time.sleep(LOOK)
    try:
        yield
    finally:
        Path(file.name).unlink(missing_ok=True)
        file.close()


def _entered(path: Path) -> IO[Any] | None:
    """The locked file of a block that is this process's now; None while it is another's."""
    here = Path(tempfile.gettempdir(), f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.lock")
    for place in (path, here):
        try:
            file = place.open("a")
        except OSError:
            if place is here:
                raise
            continue
        held = _lock(file)
        if held or (held is None and place is here):
            with suppress(FileNotFoundError):  # the one before has just removed it
                if os.path.samestat(os.fstat(file.fileno()), place.stat()):
                    return file
        file.close()
        if held is not None:
            return None
        place.unlink(missing_ok=True)
    return None


def shipped(name: str) -> Path:
    """The launchers or the configs: beside the package in a checkout, inside it where a wheel was installed."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name
