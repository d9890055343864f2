"""What a run has to tell MLflow, in a file of its folder until MLflow has taken it.

Every line is JSON: the run itself, a record, or the numbers of records that were taken. The file is written through
to the system, not to the disk: it outlives a killed process. No credentials are in it.
"""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from leap_dist.config.json_file import loads
from leap_dist.errors import UserError
from leap_dist.files import append, is_free
from leap_dist.run_folder import JOURNAL, LONGEST

LONG = 1 << 20  # characters; a longer file is written anew when everything in it was taken

Record = dict[str, Any]
"""{"id": its number, "kind": "metrics", ...}: what kinds hold, tracking/delivery.py says."""


class Journal:
    """The records of one run, in order; any thread may add and take.

    folder: where the file is, and where one that is there already is continued; None: memory alone. Only one process
    has a journal open. Raises UserError if another has it, and for a damaged file.

    run: what MLflow has to know to begin the run, and its id ("run_id") once it has begun. problem: why the file lacks
    what was noted, on a full disk for instance; "" if it has all. Then memory has it, as long as the process lives.
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / JOURNAL
        self.run: dict[str, Any] = {}
        self._waiting: dict[int, Record] = {}
        self._last: dict[str, int] = {}  # the last step of each metric
        self._next = 0
        self._lock = threading.Lock()
        self._file: FileIO | None = None
        self._unwritten = b""
        self.problem = ""
        if self.path is not None:
            self._open(self.path)

    def describe(self, **values: Any) -> None:
        """Note what the run is."""
        with self._lock:
            self.run |= values
            self._write({"run": self.run})

    def add(self, kind: str, **content: Any) -> None:
        """Note a record."""
        with self._lock:
            record = {"id": self._next, "kind": kind, **content}
            self._write(record)
            self._keep(record)

    def new_metrics(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """The metrics that were not noted yet at this step or a later one: a resumed run comes by a second time."""
        with self._lock:
            return {key: float(value) for key, value in values.items() if step > self._last.get(key, -1)}

    def waiting(self) -> list[Record]:
        """The records that MLflow has not taken yet, in order."""
        with self._lock:
            return list(self._waiting.values())

    def taken(self, records: Iterable[Record]) -> None:
        """Note that MLflow has these records."""
        with self._lock:
            numbers = [record["id"] for record in records]
            self._write({"taken": numbers})
            for number in numbers:
                self._waiting.pop(number, None)
            if self._file is not None and not self._waiting and self._file.tell() > LONG:
                self._shorten()

    def close(self, remove: bool) -> None:
        """Nothing is noted from here on. remove: the file goes if MLflow has all of it."""
        with self._lock:
            if self._file is None:
                return
            if remove and not self._waiting and self.path is not None:
                self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def _keep(self, record: Record) -> None:
        self._waiting[record["id"]] = record
        self._next = record["id"] + 1
        if record["kind"] == "metrics":
            self._last |= dict.fromkeys(record["values"], record["step"])

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        self._unwritten += json.dumps(line).encode() + b"\n"
        try:
            append(self._file, self._unwritten)
        except OSError as error:
            self.problem = error.strerror or str(error)
        else:
            self._unwritten, self.problem = b"", ""

    def _open(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _open_alone(path)
        except OSError as error:
            if path.exists():
                raise UserError(f"{path}: cannot be opened: {error.strerror}; make it readable and writable") from error
            self.problem = error.strerror or str(error)  # a new one: memory does
        else:
            self._read(self._file)

    def _read(self, file: FileIO) -> None:
        """Take over what the file holds, but for a last line that was cut off."""
        file.seek(0)
        size = os.fstat(file.fileno()).st_size
        text = file.read(min(size, LONGEST))
        whole = text[: text.rfind(b"\n") + 1]
        try:
            if size > LONGEST:
                raise ValueError(f"it has more than {LONGEST} bytes")
            for line in whole.decode().split("\n")[:-1]:
                self._replay(loads(line, finite=False))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            file.close()
            raise UserError(
                f"{self.path}: damaged, it is not a journal of MLflow records: {error}; restore or remove it"
            ) from error
        file.truncate(len(whole))

    def _replay(self, line: dict[str, Any]) -> None:
        """Raises ValueError, KeyError, TypeError or AttributeError for a line that is none of ours."""
        if "run" in line:
            if any(not isinstance(value, str | None) for value in line["run"].values()):
                raise ValueError("a run is described by texts")
            self.run |= line["run"]
            self._last |= line.get("last", {})
            self._next = line.get("next", self._next)
        elif "taken" in line:
            for number in line["taken"]:
                self._waiting.pop(number, None)
        else:
            if type(line["id"]) is not int or (line["kind"] == "metrics" and type(line["step"]) is not int):
                raise ValueError("a record has a number, and metrics a step")
            self._keep(line)

    def _shorten(self) -> None:
        """Replace the file by one that holds the run and what `new_metrics` needs."""
        assert self._file is not None and self.path is not None
        new = _open_alone(self.path.with_name(f".{JOURNAL}.partial"))
        new.truncate(0)
        try:
            append(new, json.dumps({"run": self.run, "last": self._last, "next": self._next}).encode() + b"\n")
        except OSError:  # later, then
            new.close()
            return
        os.replace(str(new.name), self.path)
        self._file.close()
        self._file = new


def _open_alone(path: Path) -> FileIO:
    """The file, for reading and appending, locked until it is closed or the process ends."""
    file = FileIO(path, "a+")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path}: is not a regular file; remove it")
    if not is_free(file):
        file.close()
        raise UserError(f"{path}: another process is sending these records to MLflow; wait until it has ended")
    return file
