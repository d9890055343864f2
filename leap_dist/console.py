"""What is printed: the console of the process, tables, durations."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import IO, Any, cast

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from leap_dist.errors import printable

PLAIN_WIDTH = 120  # columns of what is written to a file or a pipe
LONG_TEXT = 30  # columns from which a text of a table may be folded
UNITS = {"T": 1e12, "B": 1e9, "M": 1e6}  # of large counts

Rows = Sequence[Mapping[str, str | float]]


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


def summary_table(rows: Rows, title: str | None = None) -> None:
    """Print rows as a table; the columns are the keys of all rows in order of first appearance."""
    names = _names(rows)
    table = Table(title=title)
    tight = _width(rows, names, wrapped=False) > console().width  # then rich would cut numbers, too
    for name in names:
        number = _holds_numbers(rows, name)
        width = _column(rows, name, wrapped=True) if number and tight else None
        table.add_column(name, justify="right" if number else "left", overflow="fold", width=width)
    for row in rows:
        table.add_row(*(short_number(row.get(name, "")) for name in names))
    console().print(table, markup=False)


def fitting(rows: Rows, spare: Sequence[str]) -> tuple[list[dict[str, str | float]], dict[str, str], list[str]]:
    """(rows that the console has room for, what is alike in all rows and is not in them, columns that are left out).

    Empty columns go in any case; where room is short, those that are alike, then others, both in the order of `spare`.
    """
    names = [name for name in _names(rows) if any(row.get(name, "") != "" for row in rows)]
    alike: dict[str, str] = {}
    left_out: list[str] = []
    found = {name: {short_number(row.get(name, "")) for row in rows} for name in names}
    spared = [name for name in spare if name in names]
    for name in sorted(spared, key=lambda name: len(found[name]) > 1):  # stable
        if _width(rows, names, wrapped=True) <= console().width:
            break
        names.remove(name)
        if len(found[name]) == 1:
            alike |= {name: found[name].pop()}
        else:
            left_out.append(name)
    return [{name: row[name] for name in names if name in row} for row in rows], alike, left_out


def _names(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _holds_numbers(rows: Rows, name: str) -> bool:
    return all(not isinstance(row.get(name, 0.0), str) for row in rows)


def _width(rows: Rows, names: Sequence[str], wrapped: bool) -> int:
    """Of a table of these columns, with the lines and blanks between them."""
    return 1 + sum(3 + _column(rows, name, wrapped) for name in names)


def _column(rows: Rows, name: str, wrapped: bool) -> int:
    """The width of a column; wrapped: headings at their spaces, long texts anywhere, numbers never."""
    words = name.split() if wrapped else [name]
    cells = max((cell_len(short_number(row.get(name, ""))) for row in rows), default=0)
    most = LONG_TEXT if wrapped and not _holds_numbers(rows, name) else cells
    return max(min(cells, most), *map(cell_len, words or [""]))


def short_number(value: str | float) -> str:
    """Text as it is, integers in full, other numbers with four digits, large counts among them as 2.03M."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        for letter, unit in UNITS.items():
            if abs(value) >= 0.9995 * unit:  # which is rounded up to it
                return f"{value / unit:.3g}{letter}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Hours, minutes, seconds: "1:02:03", "2:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
