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


def name_of(settings: Settings) -> str:
    """A folder name from the values, the same for the same settings; long or odd ones end in a hash."""
    text = json.dumps(settings, sort_keys=True)
    words = [value if isinstance(value, str) else json.dumps(value) for value in settings.values()]
    name = re.sub(r"[^\w.]+", "-", "_".join(words)).strip("-_")
    if len(name) <= MAX_NAME and all(re.fullmatch(r"[\w.:/]+", word) for word in words):
        return name
    return f"{name[:MAX_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
