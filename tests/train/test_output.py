"""The run folder: which runs are gone on with, which folders are refused, and what a kill leaves is no harm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from leap_dist.checkpoint.manifest import MANIFEST
from leap_dist.config.job_file import parse_job
from leap_dist.errors import UserError
from leap_dist.train.output import as_logged, check_output, lock, prepared
from leap_dist.train.reference import finished_reference
from tests.sweep.jobs import JOB


def checked(output: Path, resume: bool = False, ranks: int = 1, **changes: Any) -> bool:
    return check_output(output, resume, parse_job(JOB | changes), ranks)


def begin(output: Path, ranks: int = 1, **changes: Any) -> None:
    """What a run has left that was killed."""
    job = parse_job(JOB | changes)
    with pytest.raises(KeyboardInterrupt), prepared(output, as_logged(job, ranks), 0, job.data):
        raise KeyboardInterrupt


def test_a_new_run_takes_a_folder_with_nothing_in_it(tmp_path: Path) -> None:
    assert not checked(tmp_path) and not checked(tmp_path / "a" / "b")
    (tmp_path / ".config.json.partial").touch()  # killed while its first file was written
    assert not checked(tmp_path)
    with pytest.raises(UserError, match=r"--resume: there is no unfinished run in .*; start without --resume"):
        checked(tmp_path, resume=True)


@pytest.mark.parametrize("content", ["{", "[1]", '{"leap": {}}'])
def test_a_folder_with_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"--output: .* exists and holds no run of this program; choose another folder"):
        checked(tmp_path)


def test_an_unfinished_run_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path)
    assert checked(tmp_path, resume=True) and capsys.readouterr().out == ""
    assert checked(tmp_path)
    assert capsys.readouterr().out == f"{tmp_path} holds an unfinished run of this job: it is resumed\n"


def test_changes_that_do_not_matter_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path, ranks=2)
    train = JOB["train"] | {"log_every": 5, "checkpoint_every": None}
    assert checked(tmp_path, gradient_accumulation_steps=2, zero_optimization={"stage": 3}, train=train)
    assert capsys.readouterr().out.splitlines()[1] == (
        "changed since it was started: gradient_accumulation_steps: before missing, now 2; train.checkpoint_every: "
        "before 2, now null; train.log_every: before 1, now 5; zero_optimization.stage: before missing, now 3"
    )


def test_another_job_is_refused_with_what_is_different(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(UserError, match="was started as another job; set this back, or choose another") as caught:
        checked(tmp_path, leap={"target": 0.2}, bf16={"enabled": True}, train=JOB["train"] | {"log_every": 3})
    assert str(caught.value).splitlines()[1:] == [
        "  bf16.enabled: before missing, now true",
        "  leap.target: before 0.5, now 0.2",
    ]


def test_another_number_of_examples_in_a_step_is_refused_with_what_to_set(tmp_path: Path) -> None:
    begin(tmp_path, ranks=2)
    with pytest.raises(UserError, match=r"train_batch_size: before 16, now 8; set gradient_accumulation_steps to 2"):
        checked(tmp_path)
    with pytest.raises(UserError, match=r"before 16, now 24; choose a train_micro_batch_size_per_gpu with which 3"):
        checked(tmp_path, ranks=3)
    assert checked(tmp_path, train_batch_size=16)
    assert checked(tmp_path, ranks=4, train_micro_batch_size_per_gpu=4)


def test_settings_that_are_newer_than_a_run_have_their_defaults(tmp_path: Path) -> None:
    begin(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["train"]["max_bad_steps"], settings["leap"]["score_init"]
    del settings["train_batch_size"]  # as a sweep leaves it
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert checked(tmp_path)
    with pytest.raises(UserError, match=r"leap\.score_init: before \"auto\", now \"zero\""):
        checked(tmp_path, leap={"target": 0.5, "score_init": "zero"})


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    words = r"--output: another process is writing to .*; wait for it to end"
    job = parse_job(JOB)
    with prepared(tmp_path, as_logged(job, 1), 0, job.data), pytest.raises(UserError, match=words):
        checked(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    lock(tmp_path).close()
    lock(tmp_path).close()


def test_a_folder_of_a_run_that_was_killed_at_its_very_start_is_as_new(tmp_path: Path) -> None:
    (tmp_path / "mlflow.jsonl").touch()
    (tmp_path / ".config.json.partial").touch()
    assert not checked(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="holds no run of this program"):
        checked(tmp_path)


def test_metrics_are_cut_back_to_the_checkpoint_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    with prepared(tmp_path, {}, 2, parse_job(JOB).data):
        assert metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_no_secret_is_written_and_the_run_goes_on_with_it(tmp_path: Path) -> None:
    secret: dict[str, Any] = {
        "tracking": {"mlflow_uri": "http://me:secret@host"},
        "data": {"task": "lm", "dataset": "s3://k:secret@b/c"},
    }
    begin(tmp_path, **secret)
    assert "secret" not in (tmp_path / "config.json").read_text()
    assert checked(tmp_path, **secret)


@pytest.mark.parametrize("line", ["junk", "[1]", "{}", '{"step": 1}', '{"step": "1", "phase": "dense"}', "[" * 100_000])
def test_a_junk_line_of_metrics_is_refused_before_anything_runs(tmp_path: Path, line: str) -> None:
    begin(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"metrics.jsonl:1: damaged: "):
        checked(tmp_path)


@pytest.mark.parametrize("name", [".ranks", ".ranks/lock"])
def test_a_link_in_place_of_our_files_is_refused_and_what_it_leads_to_is_left(tmp_path: Path, name: str) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    begin(folder)
    shutil.rmtree(folder / ".ranks", ignore_errors=True)
    elsewhere.mkdir()
    (elsewhere / "lock").write_text("precious")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(elsewhere if name == ".ranks" else elsewhere / "lock")
    with pytest.raises(UserError, match=r"--output: .*\.ranks is a link, or holds one; remove it"):
        checked(folder)
    assert (elsewhere / "lock").read_text() == "precious"
    shutil.rmtree(folder / ".ranks") if name != ".ranks" else (folder / ".ranks").unlink()
    (folder / ".ranks").write_text("")
    with pytest.raises(UserError, match=r"--output: .*\.ranks is a link, or holds one"):
        checked(folder)


def test_a_run_is_not_resumed_with_files_that_hold_something_else(tmp_path: Path) -> None:
    """Nor is its dense reference taken; before the first checkpoint, and without a finished one, nothing is lost."""
    run, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text("one\n")
    data = {"task": "lm", "train": str(tmp_path / "te*.txt"), "validation": str(text), "tokenizer": str(tmp_path)}
    begin(run, data=data)
    text.write_text("two\n")
    assert checked(run, data=data)
    begin(run, data=data)
    (run / "checkpoints" / "step-00000002").mkdir(parents=True)
    (run / "checkpoints" / "step-00000002" / MANIFEST).write_text("{}")
    (run / "metrics.json").write_text('{"loss": 1.0}')
    job = parse_job(JOB | {"data": data})
    assert checked(run, data=data) and finished_reference(run, job, 1) == {"loss": 1.0}
    text.write_text("three\n")
    words = rf"--output: the run in {run} was started with other data: the files of data\.train and"
    with pytest.raises(UserError, match=words):
        checked(run, data=data)
    with pytest.raises(UserError, match=words):
        finished_reference(run, job, 1)
