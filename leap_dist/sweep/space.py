"""What a search draws from, and settings drawn from it at random."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from leap_dist.sweep.grid import Settings

DIGITS = 4  # of a drawn number: enough to tell values apart, and short in a name
SEED = 0


@dataclass(frozen=True)
class Space:
    """One of `values`, or a number between two of them, also evenly by its logarithm."""

    kind: Literal["choice", "uniform", "loguniform"]
    values: tuple[Any, ...]


Vary = Mapping[str, tuple[Any, ...] | Space]
"""Dotted key of a job file -> its values; for a search also a space."""


def drawn(vary: Vary, samples: int, fits: Callable[[Settings], bool] = lambda settings: True) -> list[Settings]:
    """`samples` settings at random that fit, the same in every call; fewer where there are not as many."""
    dice = random.Random(SEED)
    seen: set[str] = set()
    found: list[Settings] = []
    for _ in range(100 * samples):  # lists of few values may come up again
        settings = {key: _draw(space, dice) for key, space in spaces(vary).items()}
        text = json.dumps(settings, sort_keys=True)
        if text not in seen and fits(settings):
            found.append(settings)
        seen.add(text)
        if len(found) == samples:
            break
    return found


def spaces(vary: Vary) -> dict[str, Space]:
    """A space for each key; a list of values is a choice."""
    return {key: value if isinstance(value, Space) else Space("choice", value) for key, value in vary.items()}


def corners(vary: Vary) -> list[Settings]:
    """Settings that together have each bound and each choice."""
    found = {key: space.values for key, space in spaces(vary).items()}
    most = max(map(len, found.values()))
    return [{key: values[min(i, len(values) - 1)] for key, values in found.items()} for i in range(most)]


def _draw(space: Space, dice: random.Random) -> Any:
    if space.kind == "choice":
        return dice.choice(space.values)
    low, high = space.values
    if space.kind == "uniform":
        return rounded(dice.uniform(low, high), low, high)
    return rounded(math.exp(dice.uniform(math.log(low), math.log(high))), low, high)


def rounded(value: float, low: float, high: float) -> float:
    """A drawn number with few digits, still within its bounds."""
    return min(max(float(f"{value:.{DIGITS}g}"), low), high)
