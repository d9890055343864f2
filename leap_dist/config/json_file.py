"""Reading JSON of files that anybody may have made, in bounded time and memory, with one message.

Refused are pipes, devices and folders, files larger than what they are for, other encodings than UTF-8, keys that stand
twice, numbers beyond what 64 bits hold, and lists or objects that are nested too deeply.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from leap_dist.config.section import show
from leap_dist.errors import UserError

LARGEST = 16 * 2**20  # bytes of a file of settings
LARGEST_NUMBER = 2**63
MOST_SHOWN = 200  # characters of a key in a message
MOST_NAMED = 50  # keys in a message


class Twice(ValueError):
    """An object with a key that stands in it twice."""


def read_json(file: Path, remedy: str = "", finite: bool = True, largest: int = LARGEST) -> dict[str, Any]:
    """The JSON object in `file`; UserError where there is none, which ends in `remedy` for a file of our own making.

    finite: whether NaN and infinite numbers are refused too. largest: bytes of the file.
    """
    return parse_json(read_text(file, remedy, largest), str(file), remedy, finite)


def parse_json(text: str, place: str, remedy: str = "", finite: bool = True) -> dict[str, Any]:
    """The JSON object that `text` is; UserError, headed by `place`, where it is none."""
    try:
        found = loads(text, finite)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _refused(place, f"not JSON: {where}: {error.msg}", remedy) from error
    except RecursionError as error:
        raise _refused(place, "lists or objects are nested too deeply", remedy) from error
    except ValueError as error:
        raise _refused(place, str(error), remedy) from error
    if not isinstance(found, dict):
        raise _refused(place, f"got {show(found)}; allowed: a JSON object", remedy)
    return found


def loads(text: str, finite: bool = True) -> Any:
    """What JSON says, and in one way only. Raises ValueError (`Twice`) and RecursionError."""
    return json.loads(
        text,
        object_pairs_hook=_unique_keys,
        parse_int=_integer,
        parse_float=_number if finite else None,
        parse_constant=_number if finite else None,
    )


def read_text(file: Path, remedy: str, largest: int) -> str:
    """The text of a plain file of at most `largest` bytes. Raises UserError for anything else."""
    try:
        # opening a pipe would wait for one who writes to it
        with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as stream:
            found = os.fstat(stream.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise _refused(file, "is not a regular file", remedy)
            if found.st_size > largest:
                raise _refused(file, f"has {found.st_size} bytes; allowed: at most {largest}", remedy)
            data = stream.read(found.st_size)  # of one that grows meanwhile, what was there
    except OSError as error:
        raise _refused(file, f"cannot be read: {error.strerror}", remedy) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _refused(file, f"not UTF-8 text: {error.reason} at byte {error.start}", remedy) from error


def shortened(text: str) -> str:
    """A key or an override as a message shows it."""
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


def _refused(place: Path | str, problem: str, remedy: str) -> UserError:
    return UserError(f"{place}: damaged: {problem}; {remedy}" if remedy else f"{place}: {problem}")


def repeated(names: Iterable[str]) -> list[str]:
    """The names that stand there more than once, in the order in which they come."""
    return [name for name, number in Counter(names).items() if number > 1]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = sorted(repeated(key for key, _ in pairs))
        raise Twice(f"the same key is given twice: {', '.join(map(shortened, twice[:MOST_NAMED]))}; keep one")
    return found


def _integer(text: str) -> int:
    if len(text) > 20 or not -LARGEST_NUMBER <= (number := int(text)) < LARGEST_NUMBER:
        raise ValueError(f"got {shortened(text)}; allowed: integers of 64 bits")
    return number


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{shortened(text)} is not JSON; allowed: a finite number")
    return number
