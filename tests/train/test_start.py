"""Ranks that cannot meet: one message; and a request to stop is heeded while they wait for each other."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow

START = """
import sys
from leap_dist.errors import UserError
from leap_dist.train.signals import Signals
from leap_dist.zero.ranks import start_ranks
with Signals() as signals, signals.at_once():
    print("waiting", flush=True)
    try:
        start_ranks(float(sys.argv[1]))
    except UserError as error:
        sys.exit(f"refused: {error}")
"""


def start(port: int, minutes: float) -> subprocess.Popen[str]:
    """The first of two ranks; the second never comes."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", START, str(minutes)]
    return subprocess.Popen(command, env=os.environ | place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_port_in_use_ranks_that_do_not_come_and_a_signal_in_the_wait() -> None:
    with socket.socket() as taken, socket.socket() as probe:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
        probe.close()
        waiting = start(free, 10.0)
        late = start(0, 0.02)
        in_use = start(taken.getsockname()[1], 10.0)
        assert waiting.stdout is not None and waiting.stdout.readline() == "waiting\n"
        told = in_use.communicate(timeout=200)[1]
        assert "refused: the ranks cannot meet (rank 0 of 2 at 127.0.0.1:" in told
        assert "end it, or choose another one with --master_port" in told
        told = late.communicate(timeout=200)[1]
        assert "refused: the ranks cannot meet" in told and "train.collective_timeout" in told
        began = time.monotonic()
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(30) == 3 and time.monotonic() - began < 10
        assert waiting.stderr is not None
        assert "stopped by SIGINT before the ranks had met: nothing was saved\n" in waiting.stderr.read()
