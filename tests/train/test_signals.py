"""Requests to stop: by signals, by the end of DeepSpeed's launcher; a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from leap_dist.stopping import HEEDED
from leap_dist.train.signals import Interrupted, Signals, launcher_processes

pytestmark = pytest.mark.slow

ROUND = """
import sys, time
from leap_dist.train import signals
signals.TOGETHER, signals.LOOK = 0.05, 0.05
with signals.Signals() as asked:
    print(signals.launcher_processes() != (), flush=True)
    while asked.asked is None:
        time.sleep(0.01)
    print(asked.asked, flush=True)
    if "on" in sys.argv:
        time.sleep(60)
"""


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("number", HEEDED)
def test_a_signal_is_a_request_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = [signal.getsignal(heeded) for heeded in HEEDED]
    with Signals() as signals:
        assert signals.asked is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher's, on top of a Ctrl-C
        wait_until(lambda: signals.asked is not None)
        assert signals.asked == number.name
    assert [signal.getsignal(heeded) for heeded in HEEDED] == before


def test_a_second_signal_ends_the_process_at_once() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ROUND, "on"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "False\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "SIGUSR1\n"
        time.sleep(0.1)  # longer than two signals are one request
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 3
        assert process.stderr.read() == "SIGINT again: ended at once; what came after the last checkpoint is lost\n"


def test_the_end_of_the_launcher_is_a_request() -> None:
    """The two processes of the launcher are shells that are called so."""
    node = f'{sys.executable} -c "$0"; true'
    command = ["sh", "-c", 'sh -c "$1" "$0" deepspeed.launcher.launch & wait', ROUND, node, "deepspeed"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "True\n"
        launcher.kill()
        assert launcher.stdout.readline() == "the end of DeepSpeed's launcher\n"


def test_the_launchers_own_signal_is_no_second_request() -> None:
    """A scheduler sends SIGTERM to all; the launcher sends another one to each rank when the one before has ended."""
    node = f'{sys.executable} -c "$0" on; true'
    told = "import os, sys\nprint(os.getpid(), file=sys.stderr, flush=True)" + ROUND
    command = ["sh", "-c", 'sh -c "$1" "$0" deepspeed.launcher.launch & wait', told, node, "deepspeed"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None and launcher.stderr is not None
        rank = int(launcher.stderr.readline())
        assert launcher.stdout.readline() == "True\n"
        os.kill(rank, signal.SIGTERM)
        assert launcher.stdout.readline() == "SIGTERM\n"
        time.sleep(0.1)
        os.kill(rank, signal.SIGTERM)
        time.sleep(0.5)
        os.kill(rank, signal.SIGINT)
        assert (
            launcher.stderr.readline() == "SIGINT again: ended at once; what came after the last checkpoint is lost\n"
        )


def test_this_process_was_not_started_by_a_launcher() -> None:
    assert launcher_processes() == ()


def test_what_an_interrupted_run_says() -> None:
    assert str(Interrupted("SIGTERM", 7, saved=True)) == (
        "stopped by SIGTERM after step 7: saved; the same command resumes from step 7"
    )
    assert str(Interrupted("SIGINT", 7, saved=False)) == "stopped by SIGINT after step 7: nothing was saved"
