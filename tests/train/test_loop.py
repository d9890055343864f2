"""What a job leaves behind in the process that ran it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from leap_dist.config.job_file import load_job
from leap_dist.train.loop import run_job
from leap_dist.train.watch import Watch
from leap_dist.zero.ranks import Ranks
from tests.ranks import RankPools
from tests.sweep.jobs import JOB


def linear_during_and_after(file: str, output: str) -> tuple[bool, bool]:
    """Whether torch's own linear is in place while a stage 3 job runs, and after it."""
    own = torch.nn.functional.linear
    during: list[bool] = []
    watch = Watch(notify=lambda *_: during.append(torch.nn.functional.linear is own))
    run_job(load_job(file, []), Path(output), False, Ranks(0, 1, torch.device("cpu")), watch)
    return any(during), torch.nn.functional.linear is own


@pytest.mark.quick
def test_a_stage_3_job_leaves_torchs_linear_as_it_was(tmp_path: Path, ranks: RankPools) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps(JOB | {"zero_optimization": {"stage": 3}}))
    assert ranks(1).run(linear_during_and_after, str(file), str(tmp_path / "run")) == [(False, True)]
