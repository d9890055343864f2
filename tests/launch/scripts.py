"""The launchers as modules, to call them inside a test's process, and as processes that start without imports."""

from __future__ import annotations

import importlib.util
import os
import runpy
import signal
import sys
from pathlib import Path
from types import ModuleType

from tests.ranks import forking

LAUNCHERS = Path(__file__).resolve().parents[2] / "launch"


class Launched:
    """`python launch/<name>.py <arguments>` as a process of its own, forked from one that has the imports done.

    What it prints goes to `log`. Leaving the context kills it, if it is still there.
    """

    def __init__(self, name: str, arguments: list[str], log: Path) -> None:
        self._log = log
        self._process = forking().Process(target=_run_script, args=(name, arguments, log), daemon=True)
        self._process.start()

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.join()

    @property
    def runs(self) -> bool:
        return bool(self._process.is_alive())

    def printed(self) -> str:
        return self._log.read_text("utf-8")

    def send(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def wait(self, timeout: float) -> int:
        """The exit code; -9 after SIGKILL. AssertionError if it is still there after `timeout` seconds."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, self.printed()
        return int(self._process.exitcode)


def _run_script(name: str, arguments: list[str], log: Path) -> None:
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    script = LAUNCHERS / f"{name}.py"
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def load_script(name: str) -> ModuleType:
    """launch/<name>.py."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", LAUNCHERS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
