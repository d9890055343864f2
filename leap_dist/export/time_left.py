"""What a long export is at, and about how long it still takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from leap_dist.console import duration


class TimeLeft:
    """Lines on standard error, one for each step that begins.

    total: work of all steps, in any unit (tokens that go through a model); what is left is taken to run as fast as
    what is done. optional: (work, work of a trial, seconds) of steps, not in the total, that are skipped where their
    trial takes longer than that. of: what the lines begin with.
    """

    def __init__(self, total: float, optional: Sequence[tuple[float, float, float]] = ()) -> None:
        self.of = ""
        self._total, self._optional, self._done, self._begun = total, optional, 0.0, 0.0
        self._started = time.monotonic()

    def begin(self, text: str, work: float) -> None:
        """The step before is done; the next one is `work`."""
        self._done += self._begun
        self._begun = work
        each = (time.monotonic() - self._started) / self._done if self._done else 0.0  # seconds, of a unit of work
        total = self._total + sum(work for work, trial, limit in self._optional if trial * each <= limit)
        share = min(self._done / total, 1.0)
        about = f", about {duration(each * (total - self._done))} left" if 0 < share < 1 else ""
        text = f"{self.of}: {text}" if self.of else text
        print(f"{text} ({share:.0%} done{about})", file=sys.stderr, flush=True)
