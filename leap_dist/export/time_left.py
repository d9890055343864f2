"""What a long export is at, and about how long it still takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from leap_dist.console import duration

EARLIEST = 0.05
"""The share that is done before a time is shown."""


class TimeLeft:
    """Lines on standard error, one for each step that begins.

    total: work of all steps, in any unit (tokens that go through a model); what is left is taken to run as fast as
    what is done, without the first step, which finds everything cold. optional: (work, work of a trial, seconds) of
    steps, not in the total, that are skipped where their trial takes longer than that. of: what the lines begin with.
    """

    def __init__(self, total: float, optional: Sequence[tuple[float, float, float]] = ()) -> None:
        self.of = ""
        self._total, self._optional, self._done, self._begun, self._share = total, optional, 0.0, 0.0, 0.0
        self._cold = self._warm = (0.0, 0.0)  # (time, work done) at the begin and the end of the first step

    def begin(self, text: str, work: float) -> None:
        """The step before is done; the next one is `work`."""
        now = time.monotonic()
        self._done += self._begun
        self._begun = work
        if not self._done:
            self._cold = now, 0.0
        elif not self._warm[1]:
            self._warm = now, self._done
        since, before = self._warm if self._done > self._warm[1] else self._cold
        each = (now - since) / (self._done - before) if self._done else 0.0  # seconds, of a unit of work
        total = self._total + sum(work for work, trial, limit in self._optional if trial * each <= limit)
        self._share = max(self._share, min(self._done / total, 1.0))
        told = EARLIEST <= self._done / total < 1
        about = f", about {duration(each * (total - self._done))} left" if told else ""
        text = f"{self.of}: {text}" if self.of else text
        print(f"{text} ({self._share:.0%} done{about})", file=sys.stderr, flush=True)
