"""Changes to files and JSON for fuzz tests; $LEAP_FUZZ sets how many inputs each reader gets."""

import copy
import os
from typing import Any

from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("LEAP_FUZZ", "50"))
NUMBERS = st.integers() | st.floats() | st.sampled_from([-1, 0, 1, 2**31, 2**53, 2**63, 2**64, 10**400, 1e308])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.sampled_from(["../x", "/etc/passwd", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def changed_bytes(content: bytes, data: st.DataObject) -> bytes:
    """The content with bits flipped, cut, doubled or overwritten, once or a few times."""
    mutated = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        first = data.draw(st.integers(0, max(len(mutated) - 1, 0)))
        last = min(len(mutated), first + data.draw(st.sampled_from([1, 2, 8, 100, len(content)])))
        kind = data.draw(st.sampled_from(["flip", "overwrite", "cut", "double"]))
        if kind == "flip" and mutated:
            mutated[first] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "overwrite":
            mutated[first:last] = data.draw(st.binary(max_size=8))
        elif kind == "cut":
            del mutated[first:last]
        else:
            mutated[first:first] = mutated[first:last]
    return bytes(mutated)


def changed_json(body: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """The object with values somewhere in it replaced, removed or added."""
    mutated = copy.deepcopy(body)
    for _ in range(data.draw(st.integers(1, 3))):
        places = list(_places(mutated))
        if not places:
            break
        holder, key = data.draw(st.sampled_from(places))
        kind = data.draw(st.sampled_from(["replace", "replace", "near", "remove", "add"]))
        value = holder[key]
        if kind == "remove":
            del holder[key]
        elif kind == "add" and isinstance(holder, dict):
            holder[data.draw(st.text(max_size=4))] = data.draw(VALUES)
        elif kind == "near" and isinstance(value, int | float):
            holder[key] = value + data.draw(st.sampled_from([-1, 1, 0.5, 2**20]))
        else:
            holder[key] = data.draw(VALUES)
    return mutated


def _places(value: Any) -> Any:
    """Every (holder, key or index) in a JSON value."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])
