"""What is printed: the console of the process, tables, durations."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import IO, Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from leap_dist.errors import printable

PLAIN_WIDTH = 120  # columns of what is written to a file or a pipe


class _Console(Console):
    """Names, labels and messages come from outside: a terminal shows what is in them, and does not obey it."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


class _Stdout:
    """Standard output as it is at the time. What it does not take, as a closed pipe or a full disk, ends nothing."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            sys.stdout.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stdout.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)


@cache
def console() -> Console:
    """The console of the process, on standard output."""
    shown = _Console(highlight=False, file=cast(IO[str], _Stdout()))
    if not shown.is_terminal:
        shown.width = PLAIN_WIDTH
    return shown


def summary_table(rows: Sequence[Mapping[str, str | float]], title: str | None = None) -> None:
    """Print rows as a table; the columns are the keys of all rows in order of first appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title)
    for name in names:
        number = all(not isinstance(row.get(name, 0.0), str) for row in rows)
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(short_number(row.get(name, "")) for name in names))
    console().print(table, markup=False)


def short_number(value: str | float) -> str:
    """Text as it is, integers in full, other numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Hours, minutes, seconds: "1:02:03", "2:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
