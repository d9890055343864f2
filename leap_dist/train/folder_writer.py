"""What a run writes about itself and what it cannot do without, on a disk that fills up, in a folder that goes away.

Nothing that only reports of a run ends it. Without its model and its certificate a run has no result: there a disk that
is full ends it, in one message.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from leap_dist.console import console
from leap_dist.errors import UserError
from leap_dist.files import Lines, write_text
from leap_dist.run_folder import METRICS, REPORT
from leap_dist.tracking.report import write_report


class FolderWriter:
    """Writes what only reports of a run. What cannot be written is said once, waits in memory, and is tried again.

    lock: an open file in the folder, by which one sees that the folder is still there.
    """

    def __init__(self, output: Path, lock: IO[str]) -> None:
        self._output, self._lock = output, lock
        self._lines = Lines(output / METRICS)
        self._texts: dict[str, str] = {}  # by file name, those that wait
        self._said: set[str] = set()

    def check(self) -> None:
        """Raises UserError if the folder was removed, or is another one now."""
        try:
            same = os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self._lock.name))
        except FileNotFoundError:
            same = False
        if not same:
            raise UserError(
                f"--output: {self._output} was removed or renamed while the run was writing to it; start the run again"
            )

    def metrics(self, values: Mapping[str, Any]) -> None:
        """One line more in metrics.jsonl."""
        self._write_waiting()
        try:
            self._lines.add(json.dumps(values))
        except OSError as error:
            self._say(METRICS, error)

    def text(self, name: str, text: str) -> None:
        """A small file."""
        self._texts[name] = text
        self._write_waiting()

    def page(self) -> list[Path]:
        """The pictures and the page of a finished run; nothing where they could not be made."""
        self._write_waiting()
        try:
            return write_report(self._output)
        except Exception as error:  # the run is complete, whatever this is
            console().print(
                f"warning: the pictures and {REPORT} in {self._output} could not be made: {reason(error)}; the run is "
                "complete; fix this and run the same command again to make them",
                markup=False,
                soft_wrap=True,
            )
            return []

    def close(self) -> None:
        """Try a last time; say what is missing for good."""
        self._write_waiting()
        missing = [*self._texts, *([f"{len(self._lines)} lines of {METRICS}"] if len(self._lines) else [])]
        if missing:
            text = f"warning: {self._output} lacks {', '.join(missing)}: the disk has not taken them, and they are lost"
            console().print(text, markup=False, soft_wrap=True)

    def _write_waiting(self) -> None:
        for name, text in list(self._texts.items()):
            try:
                write_text(self._output / name, text)
                del self._texts[name]
            except OSError as error:
                self._say(name, error)
        try:
            self._lines.flush()
        except OSError as error:
            self._say(METRICS, error)

    def _say(self, name: str, error: OSError) -> None:
        if name not in self._said:
            self._said.add(name)
            text = (
                f"warning: {self._output / name} cannot be written: {reason(error)}; the run continues, and tries again"
            )
            console().print(text, markup=False, soft_wrap=True)


@contextmanager
def needed(path: Path, remedy: str) -> Iterator[None]:
    """A block that writes what a run cannot do without. Raises UserError, with `remedy`, where that fails."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {reason(error)}; {remedy}") from error


def reason(error: BaseException) -> str:
    """What went wrong, in a line."""
    lines = str((isinstance(error, OSError) and error.strerror) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
