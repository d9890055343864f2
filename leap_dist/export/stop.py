"""Signals that end an export: what is half written is removed on the way out."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from leap_dist.stopping import HEEDED, Raises


class Stopped(BaseException):
    """A signal, whose name it is, asked the process to end. No Exception: nobody on the way out takes it for a fault"""


@contextmanager
def stoppable() -> Iterator[None]:
    """A block of the main thread in which a HEEDED signal raises Stopped; more of them within TOGETHER are one."""
    stop = Raises(Stopped)
    handlers = {number: signal.signal(number, stop) for number in HEEDED}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
