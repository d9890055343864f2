"""Grids: every combination of the values that a sweep varies, each with a name that a folder can have."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from leap_dist.errors import UserError

Settings = dict[str, Any]
"""Dotted key of a job file -> value."""

MAX_NAME = 80  # characters
MOST_CELLS = 10_000
PLAIN_TEXT = re.compile(r"[a-z][a-z0-9]*(/[a-z][a-z0-9]*|:[0-9][a-z0-9]*)*|[0-9]+:[0-9]+")
PLAIN_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?|true|false|null")
"""A name made of such values alone can be read back: "-" before a letter was "/", before a digit ":"."""


def expand(vary: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """All combinations, the last key changing fastest. Raises UserError for more than MOST_CELLS."""
    num = math.prod(map(len, vary.values()))
    if num > MOST_CELLS:
        raise UserError(f"vary: got {num} combinations; allowed: at most {MOST_CELLS}; give fewer values, or split it")
    return [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]


def varying(grid: Sequence[Settings]) -> set[str]:
    """The keys that have not the same value everywhere."""
    return {key for key in _keys(grid) if any(settings.get(key) != grid[0].get(key) for settings in grid)}


def _keys(grid: Sequence[Settings]) -> list[str]:
    return list(dict.fromkeys(key for settings in grid for key in settings))


def names(grid: Sequence[Settings]) -> list[str]:
    """A folder name for each combination, no two the same, also where upper and lower case are the same."""
    plain = [name_of(settings) for settings in grid]
    times = Counter(name.casefold() for name in plain)
    return [
        name if times[name.casefold()] == 1 else f"{name}-{_digest(settings)}"
        for name, settings in zip(plain, grid, strict=True)
    ]


def name_of(settings: Settings) -> str:
    """A folder name from the values, the same for the same settings; long or odd ones end in a hash.

    It starts with a letter or a digit, and has ASCII letters, digits, "-", "_" and "." alone.
    """
    values = [value if _is_list_of_texts(value) else [value] for value in settings.values()]
    texts = "_".join("-".join(map(_text, words)) for words in values)
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", texts)
    if 0 < len(name) <= MAX_NAME and all(_is_plain(word) for words in values for word in words):
        return name
    return f"{name.strip('-_.')[:MAX_NAME]}-{_digest(settings)}".lstrip("-")


def _digest(settings: Settings) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, str) for part in value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value).replace("e+", "e")


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return PLAIN_TEXT.fullmatch(value) is not None and value not in ("true", "false", "null")
    return PLAIN_NUMBER.fullmatch(json.dumps(value)) is not None


def written(grid: Sequence[Settings]) -> list[dict[str, str | float]]:
    """All settings as they stand in a table, with the options of gates where values of a key differ in these alone."""
    values = {key: [settings[key] for settings in grid if key in settings] for key in _keys(grid)}
    whole = {key for key, found in values.items() if len(set(map(short, found))) < len(set(map(json.dumps, found)))}
    return [{key: short(value, key in whole) for key, value in settings.items()} for settings in grid]


def short(value: Any, whole: bool = False) -> str | float:
    """A setting as it stands in a table: gates by their granularity, a section by its keys and values.

    whole: gates with their options.
    """
    if isinstance(value, str | int | float):
        return value
    return " + ".join(_part(part, whole) for part in (value if isinstance(value, list) else [value]))


def _part(value: Any, whole: bool) -> str:
    if not isinstance(value, dict):
        return str(value)
    options = ", ".join(f"{k} {v}" for k, v in value.items() if k != "granularity")
    if "granularity" not in value:
        return options
    return f"{value['granularity']} ({options})" if whole and options else str(value["granularity"])
