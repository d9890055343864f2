"""A job as a process: its exit code, and that a fault of the user's machine is one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from leap_dist.config.job_file import parse_job
from leap_dist.errors import UserError
from leap_dist.train import process
from leap_dist.train.signals import STOPPED, Interrupted
from leap_dist.zero.ranks import Ranks
from tests.sweep.jobs import JOB

pytestmark = pytest.mark.slow


def ended(monkeypatch: pytest.MonkeyPatch, world_size: int, error: Exception | None) -> int:
    """How the process of a rank ends whose job ends with `error`."""

    def run_job(*_: Any) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(process, "start_ranks", lambda minutes: Ranks(0, world_size, torch.device("cpu")))
    monkeypatch.setattr(process, "run_job", run_job)
    return process.run_process(parse_job(JOB), Path("run"), False)


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(monkeypatch, 1, None) == 0
    assert ended(monkeypatch, 1, Interrupted("SIGTERM", 7, saved=True)) == STOPPED == 3
    assert capsys.readouterr().out == "stopped by SIGTERM after step 7: saved; the same command resumes from step 7\n"
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer\nmore")
    assert ended(monkeypatch, 2, lost) == 1
    assert capsys.readouterr().err == (
        "error: rank 0 has lost another rank ([gloo/transport/tcp/pair.cc:553] Connection closed by peer); start the "
        "job again: it resumes from its last checkpoint\n"
    )


def test_what_is_no_matter_of_ranks_or_memory_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="Connection closed"):  # by whom, with one rank?
        ended(monkeypatch, 1, RuntimeError("Connection closed by peer"))
    with pytest.raises(UserError, match="as it is"):
        ended(monkeypatch, 2, UserError("gloo: as it is"))
    with pytest.raises(UserError, match=r"not enough memory: CUDA out of memory; what helps:\n  lower train_micro"):
        ended(monkeypatch, 2, torch.OutOfMemoryError("CUDA out of memory"))
