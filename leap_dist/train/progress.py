"""What the user sees of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from time import monotonic

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as LiveProgress

from leap_dist.console import console, duration, short_number
from leap_dist.errors import printable

LINE_EVERY = 5.0  # seconds between two plain lines
RATE_OVER = 50  # updates over which steps/s is measured


class Progress:
    """Shows steps, phase and measures of a run of `total` optimizer steps; a context manager.

    A resumed run counts from `start`. With `enabled` false (other ranks than 0) nothing is shown. `aside`: of what a
    run does beside its steps, such as an evaluation, which is shown only where it takes long.
    """

    def __init__(self, total: int, enabled: bool, start: int = 0, aside: bool = False) -> None:
        self._total = total
        self._enabled = enabled
        self._from = monotonic() + (LINE_EVERY if aside else 0.0)
        self._clock = deque([(monotonic(), start)], maxlen=RATE_OVER + 1)
        self._last_line: float | None = None
        self._live = _live_progress(transient=aside) if enabled and console().is_terminal else None
        self._task = self._live.add_task("", total=total, completed=start, text="") if self._live else None

    def __enter__(self) -> Progress:
        if self._live and monotonic() >= self._from:
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
        if now < self._from:
            return
        text = f"{_fields_text(fields)}  {self._rate_text(step)}"
        if self._live and self._task is not None:
            self._live.start()  # which an evaluation has not yet
            self._live.update(self._task, completed=step, description=phase, text=printable(text))
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


def _live_progress(transient: bool) -> LiveProgress:
    return LiveProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        console=console(),
        transient=transient,
    )


def _fields_text(fields: Mapping[str, float]) -> str:
    paired = "R" in fields and "target" in fields
    parts = []
    for name, value in fields.items():
        if paired and name == "R":
            parts.append(f"R {short_number(value)} → {short_number(fields['target'])}")
        elif not (paired and name == "target"):
            parts.append(f"{name} {short_number(value)}")
    return "  ".join(parts)
