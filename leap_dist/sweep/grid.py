"""Grids: every combination of the values that a study varies, each with a name that a folder can have."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Settings = dict[str, Any]
"""Dotted key of a job file -> value."""

MAX_NAME = 80  # characters


def expand(vary: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """All combinations, the last key changing fastest."""
    return [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]


def varying(grid: Sequence[Settings]) -> set[str]:
    """The keys that have not the same value everywhere."""
    keys = {key for settings in grid for key in settings}
    return {key for key in keys if any(settings.get(key) != grid[0].get(key) for settings in grid)}


def name_of(settings: Settings) -> str:
    """A folder name from the values, the same for the same settings; long or odd ones end in a hash."""
    values = [_words(value) for value in settings.values()]
    name = re.sub(r"[^\w.]+", "-", "_".join("-".join(words) for words in values)).strip("-_")
    if len(name) <= MAX_NAME and all(re.fullmatch(r"[\w.:/]+", word) for words in values for word in words):
        return name
    text = json.dumps(settings, sort_keys=True)
    return f"{name[:MAX_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _words(value: Any) -> list[str]:
    """A value as words: strings, also those in a list, as they are."""
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        return value
    return [value if isinstance(value, str) else json.dumps(value)]


def short(value: Any) -> str | float:
    """A setting as it stands in a table: gates by their granularity, a section by its keys and values."""
    if isinstance(value, str | int | float):
        return value
    return " + ".join(map(_part, value if isinstance(value, list) else [value]))


def _part(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return str(value.get("granularity")) if "granularity" in value else ", ".join(f"{k} {v}" for k, v in value.items())
