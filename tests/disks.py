"""Filling the small file system of the fixture `small_disk`, and freeing it."""

from __future__ import annotations

import contextlib
from pathlib import Path


def fill(disk: Path) -> None:
    """Until not a byte more goes in."""
    with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)


def free(disk: Path) -> None:
    (disk / "filler").unlink(missing_ok=True)
