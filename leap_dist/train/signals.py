"""Signals that ask a run to end: it finishes its step, saves and leaves; a second one ends it at once.

A thread reads them from a pipe that Python's C code writes to, so that a rank is also ended while it waits in a
collective, where no handler of Python's runs.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from leap_dist.stopping import HEEDED, STOPPED, TOGETHER

LOOK = 1.0  # seconds between two looks at the launcher


class Interrupted(Exception):
    """A run that was asked to end, and has, after a whole step; `saved`: whether it can resume from there."""

    def __init__(self, why: str, step: int, saved: bool) -> None:
        outlook = f"saved; the same command resumes from step {step}" if saved else "nothing was saved"
        super().__init__(f"stopped by {why} after step {step}: {outlook}")


class Signals:
    """A context of the main thread in which HEEDED signals, and the end of DeepSpeed's launcher, are requests.

    `asked` is how a request arrived, "SIGTERM" for instance; None as long as there is none.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._since = 0.0
        self._at_once = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block in which there is nothing to save, and that may wait long for others: a request ends it at once."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def __enter__(self) -> Signals:
        self._launcher = launcher_processes()
        self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._ends, self._end = os.pipe2(os.O_CLOEXEC)
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in HEEDED}
        self._thread = threading.Thread(target=self._read, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._end)
        self._thread.join()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        for descriptor in (*self._pipe, self._ends):
            os.close(descriptor)

    def _read(self) -> None:
        while True:
            ready, _, _ = select.select([self._pipe[0], self._ends], [], [], LOOK)
            if self._ends in ready:
                return
            if self._pipe[0] in ready:
                for number in os.read(self._pipe[0], 64):
                    if number in HEEDED:
                        self._ask(signal.Signals(number).name)
            elif self.asked is None and launcher_processes() != self._launcher:
                self._ask("the end of DeepSpeed's launcher")

    def _ask(self, why: str) -> None:
        now = time.monotonic()
        if self._at_once:
            os.write(2, f"stopped by {why} before the ranks had met: nothing was saved\n".encode())
            os._exit(STOPPED)
        if self.asked is None:
            self.asked, self._since = why, now
        elif now - self._since > TOGETHER and not (self._launcher and why == signal.SIGTERM.name):
            # the launcher ends its ranks one after the other, and waits for each: its SIGTERM is no second request
            os.write(2, f"{why} again: ended at once; what came after the last checkpoint is lost\n".encode())
            os._exit(STOPPED)


def launcher_processes() -> tuple[int, ...]:
    """The processes of `deepspeed` above this one on this machine; () if it was started in another way.

    The command starts a process for the node, and that one the ranks. It hands no SIGTERM on: it just is not there any
    more, and so ranks have to look.
    """
    found: list[int] = []
    process = os.getppid()
    for words in (b"deepspeed.launcher.launch", b"deepspeed"):
        try:
            command = Path(f"/proc/{process}/cmdline").read_bytes()
            status = Path(f"/proc/{process}/stat").read_text()
        except OSError:  # it has just ended
            break
        if words not in command:
            break
        found.append(process)
        process = int(status.rpartition(")")[2].split()[1])
    return tuple(found)
