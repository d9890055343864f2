"""What asks a command to end, and how it says that it has: alike in training, sweeps and exports."""

import math
import signal
import time

HEEDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED = 3
"""Exit code of a command that a signal has ended."""
TOGETHER = 2.0
"""Seconds in which signals are one request: on Ctrl-C the terminal sends one, and DeepSpeed's launcher another."""


class Raises:
    """A handler that raises `error` with the signal's name, once for signals that come together."""

    def __init__(self, error: type[BaseException]) -> None:
        self._error, self._last = error, -math.inf

    def __call__(self, number: int, frame: object) -> None:
        before, self._last = self._last, time.monotonic()
        if self._last - before > TOGETHER:
            raise self._error(signal.Signals(number).name)
