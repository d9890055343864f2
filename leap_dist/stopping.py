"""What asks a command to end, and how it says that it has: alike in training, sweeps and exports."""

import signal

HEEDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED = 3
"""Exit code of a command that a signal has ended."""
TOGETHER = 2.0
"""Seconds in which signals are one request: on Ctrl-C the terminal sends one, and DeepSpeed's launcher another."""
