"""What a rank finds in a trial's folder before it begins."""

from __future__ import annotations

from pathlib import Path

from leap_dist.config.job_file import parse_job
from leap_dist.sweep.rank import Work, _prepare
from tests.sweep.jobs import JOB


def test_a_trial_without_a_checkpoint_begins_anew_but_for_its_dense_reference(tmp_path: Path) -> None:
    folder = tmp_path / "trial"
    work = Work(parse_job(JOB), folder)
    assert _prepare(work) == "new"
    for name in (".dense_reference/checkpoints/step-00000002", "checkpoints", ".ranks"):
        (folder / name).mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert _prepare(work) == "new"
    left = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    assert left == [".dense_reference", ".dense_reference/checkpoints", ".dense_reference/checkpoints/step-00000002"]
