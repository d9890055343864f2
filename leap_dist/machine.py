"""The machine: where something was measured and with what, and variables of the environment for a while."""

import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("leap_dist", "torch", "transformers", "onnxruntime")


def machine() -> dict[str, Any]:
    """Where something was measured, with what, at which commit of a checkout; `load` is that of the last minute."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "versions": {"python": platform.python_version()}
        | {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
    }


@contextmanager
def changed_environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Variables of the environment for a while, None: without it. No other is touched: threads may change those."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _processor() -> str:
    """The processor's name as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that this package runs from; None where git does not track it, as in another project's .venv."""
    if not _git("ls-files", Path(__file__).name):
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=12")


def _git(*command: str) -> str | None:
    """What git prints in the folder of this package; None where it fails or prints nothing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *command], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def wait_for_device() -> None:
    """Until an accelerator, if there is one, has done what it was given: what is timed has ended then."""
    import torch  # not by everyone who asks for the machine

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
