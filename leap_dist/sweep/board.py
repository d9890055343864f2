"""What the user sees of a sweep: a line for each trial that ends, and how far the others are."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from time import monotonic

from rich.text import Text

from leap_dist.console import console, duration
from leap_dist.errors import printable
from leap_dist.sweep.rank import Outcome, State

LINE_EVERY = 10.0  # seconds between two plain lines
ENDINGS = {"done": "done", "failed": "FAILED", "stopped": "stopped early", "lost": "lost"}


class Board:
    """Shows a sweep of `total` trials, `before` of which have ended earlier; a context manager."""

    def __init__(self, total: int, before: int) -> None:
        self._total, self._ended, self._before = total, before, before
        self._began, self._last = monotonic(), monotonic()
        self._stack = ExitStack()

    def __enter__(self) -> Board:
        shown = console()
        self._status = self._stack.enter_context(shown.status("starting")) if shown.is_terminal else None
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def ended(self, name: str, outcome: Outcome) -> None:
        """A line for a trial that has ended."""
        self._ended += 1
        why = f": {outcome.error}" if outcome.error else ""
        self.tell(f"{self._ended}/{self._total}  {name}  {ENDINGS[outcome.kind]}{why}  {duration(outcome.seconds)}")

    def tell(self, text: str) -> None:
        """A line of its own."""
        console().print(text, markup=False, soft_wrap=True)

    def show(self, running: Mapping[str, State]) -> None:
        """How far everything is; on a terminal in place, elsewhere a line every LINE_EVERY seconds."""
        parts = {name: state.step / state.total if state.total else 0.0 for name, state in running.items()}
        work = self._ended - self._before + sum(parts.values())
        seconds = monotonic() - self._began
        left = self._total - self._before - work
        rate = f"{3600 * work / seconds:.3g} trials/h  ETA {duration(left * seconds / work)}" if work else "ETA -"
        parts_said = {name: f"{part:.0%}" if running[name].total else "starting" for name, part in parts.items()}
        now = ", ".join(f"{name} {part}" for name, part in parts_said.items()) or "none"
        text = f"{self._ended}/{self._total} ended  running: {now}  {rate}"
        if self._status:
            self._status.update(Text(printable(text)))
        elif monotonic() - self._last >= LINE_EVERY:
            self._last = monotonic()
            self.tell(text)
