"""What the user sees of a run: a bar on a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import cache
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as LiveProgress
from rich.table import Table

LINE_EVERY = 5.0  # seconds between two plain lines
RATE_OVER = 50  # updates over which steps/s is measured
PLAIN_WIDTH = 120  # columns of what is written to a file or a pipe


@cache
def console() -> Console:
    """The console of the process, on standard output."""
    shown = Console(highlight=False)
    if not shown.is_terminal:
        shown.width = PLAIN_WIDTH
    return shown


class Progress:
    """Shows steps, phase and measures of a run of `total` optimizer steps; a context manager.

    A resumed run counts from `start`. With `enabled` false (other ranks than 0) nothing is shown.
    """

    def __init__(self, total: int, enabled: bool, start: int = 0) -> None:
        self._total = total
        self._enabled = enabled
        self._clock = deque([(monotonic(), start)], maxlen=RATE_OVER + 1)
        self._last_line: float | None = None
        self._live = _live_progress() if enabled and console().is_terminal else None
        self._task = self._live.add_task("", total=total, completed=start, text="") if self._live else None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, step: int, phase: str, fields: Mapping[str, float]) -> None:
        """Show that `step` optimizer steps are done; `fields` in their order, "R" and "target" as a pair."""
        if not self._enabled:
            return
        now = monotonic()
        self._clock.append((now, step))
        text = f"{_fields_text(fields)}  {self._rate_text(step)}"
        if self._live and self._task is not None:
            self._live.update(self._task, completed=step, description=phase, text=text)
        elif self._last_line is None or now - self._last_line >= LINE_EVERY or step >= self._total:
            self._last_line = now
            line = f"step {step}/{self._total}  {phase}  {text}"
            console().print(line, markup=False, soft_wrap=True)

    def _rate_text(self, step: int) -> str:
        (first_time, first_step), (last_time, last_step) = self._clock[0], self._clock[-1]
        if last_step <= first_step or last_time <= first_time:
            return "- steps/s  ETA -"
        rate = (last_step - first_step) / (last_time - first_time)
        return f"{rate:.3g} steps/s  ETA {duration(max(0, self._total - step) / rate)}"


def summary_table(rows: Sequence[Mapping[str, str | float]], title: str | None = None) -> None:
    """Print rows as a table; the columns are the keys of all rows in order of first appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title)
    for name in names:
        number = all(not isinstance(row.get(name, 0.0), str) for row in rows)
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(name, "")) for name in names))
    console().print(table, markup=False)


def _live_progress() -> LiveProgress:
    return LiveProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        console=console(),
    )


def _fields_text(fields: Mapping[str, float]) -> str:
    paired = "R" in fields and "target" in fields
    parts = []
    for name, value in fields.items():
        if paired and name == "R":
            parts.append(f"R {_cell(value)} → {_cell(fields['target'])}")
        elif not (paired and name == "target"):
            parts.append(f"{name} {_cell(value)}")
    return "  ".join(parts)


def _cell(value: str | float) -> str:
    """Text as it is, integers in full, other numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Hours, minutes, seconds: "1:02:03", "2:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
