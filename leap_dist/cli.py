"""The console scripts: leap-prune is launch/prune.py, and so on, also where a wheel was installed.

A launcher runs as one process; several ranks are started by `deepspeed --no_python leap-prune ...`.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType

from leap_dist.errors import UserError, show_fault
from leap_dist.files import shipped


def _command(name: str) -> Callable[[], int]:
    """A function that runs launch/<name>.py; its exit code."""

    def run() -> int:
        code: int = _load(name).main()
        return code

    return run


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line of a launcher, whose faults show no secrets from here on.

    A shell that asks for completions gets them, and this process ends.
    """
    sys.excepthook = show_fault
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
    return parser.parse_args()


def check_threads(*counts: int) -> None:
    """Raises UserError for a --threads that no machine has."""
    for count in counts:
        if count < 1:
            raise UserError(f"--threads: got {count}; allowed: an integer >= 1")


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"leap_{name}", shipped("launch") / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prune, sweep, compare, export, bench = map(_command, ("prune", "sweep", "compare", "export", "bench"))
