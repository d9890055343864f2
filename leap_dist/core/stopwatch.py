"""Where the time of a step goes, part by part; a part inside another one is taken off it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PARTS = ("update", "select", "mask", "communication")
TIMINGS = tuple(f"leap_ms_{part}" for part in PARTS)  # keys of LeapAdamW.measures() that differ between equal runs


class Stopwatch:
    """Milliseconds of one step by part: clocks on the CPU, events on CUDA, which are read only when asked for."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device is not None and device.type == "cuda"
        self._marks: list[tuple[str | None, Any]] = []  # which part begins when: milliseconds, or an event
        self._running: list[str] = []

    def restart(self) -> None:
        """Forget what was measured."""
        self._marks.clear()

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count the time of this block to a part."""
        self._running.append(part)
        self._mark()
        try:
            yield
        finally:
            self._running.pop()
            self._mark()

    def _mark(self) -> None:
        now: Any = 1e3 * time.perf_counter()
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((self._running[-1] if self._running else None, now))

    def milliseconds(self) -> dict[str, float]:
        """{"leap_ms_<part>": milliseconds since the restart}; waits on CUDA for the last event."""
        totals = dict.fromkeys(TIMINGS, 0.0)
        if self._cuda and self._marks:
            self._marks[-1][1].synchronize()
        for (part, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if part is not None:
                spent = end - begin if isinstance(begin, float) else begin.elapsed_time(end)
                totals[f"leap_ms_{part}"] += spent
        return totals
