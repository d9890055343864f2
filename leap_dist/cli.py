"""The console scripts: leap-prune is launch/prune.py, and so on, also where a wheel was installed.

A launcher runs as one process; several ranks are started by `deepspeed --no_python leap-prune ...`.
"""

import argparse
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

from leap_dist.files import shipped


def _command(name: str) -> Callable[[], int]:
    """A function that runs launch/<name>.py; its exit code."""

    def run() -> int:
        module = _load(name)
        if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions: it gets them, and this process ends
            import argcomplete

            argparse.ArgumentParser.parse_args = lambda parser: argcomplete.autocomplete(parser)  # type: ignore[method-assign,assignment]
        code: int = module.main()
        return code

    return run


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"leap_{name}", shipped("launch") / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prune, study, sweep, compare, export, bench = map(_command, ("prune", "study", "sweep", "compare", "export", "bench"))
