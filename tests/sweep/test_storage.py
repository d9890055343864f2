"""Where results are kept: copies at a URI are complete, whatever was cut off or could not be reached on the way."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from fsspec import register_implementation  # type: ignore[import-untyped]
from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]

from leap_dist.errors import UserError
from leap_dist.sweep.line import Line
from leap_dist.sweep.rank import Outcome
from leap_dist.sweep.storage import Storage
from leap_dist.sweep.sweep_file import read_sweep, trials_of
from tests.ranks import RankError, RankPools
from tests.sweep.jobs import JOB, run_without_ray, sweep_file
from tests.tracking.folders import run_folder


def test_finished_runs_are_copied_to_a_uri(tmp_path: Path) -> None:
    storage = Storage((tmp_path / "far").as_uri(), tmp_path / "near")
    (tmp_path / "near" / "0.5" / "model").mkdir(parents=True)
    (tmp_path / "near" / "0.5" / "model" / "x").write_text("weights")
    (tmp_path / "near" / "results.json").write_text("{}")
    for name in ("0.5", "0.5", "results.json"):
        storage.publish(name)
    copied = sorted(str(path.relative_to(tmp_path / "far")) for path in (tmp_path / "far").rglob("*"))
    assert copied == ["0.5", "0.5/model", "0.5/model/x", "results.json"]
    with pytest.raises(UserError, match=r'^--output: got "nosuch://x", which cannot be written to'):
        Storage("nosuch://x", tmp_path)


def run_cut_off(file: str, far: str, folder: str, killed: bool) -> list[str]:
    """A sweep in `folder` whose results are to be at a URI; `killed`: before a trial that is done is copied there."""
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        if killed:
            patch.setattr(Line, "end", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        return run_without_ray(file, far)


def test_a_trial_that_was_not_copied_is_copied_by_the_same_command(tmp_path: Path, ranks: RankPools) -> None:
    job: dict[str, Any] = {"train": {**JOB["train"], "max_steps": 10}}
    file, far = sweep_file(tmp_path, job, vary={"leap.target": [0.5]}), tmp_path / "far"
    with pytest.raises(RankError):
        ranks(1).run(run_cut_off, str(file), far.as_uri(), str(tmp_path), True)
    near = tmp_path / "outputs" / "sweep" / "0.5"
    (near / "report.html").unlink()
    assert (near / "certificate.json").is_file() and not (far / "0.5").exists()
    for _ in range(2):
        assert ranks(1).run(run_cut_off, str(file), far.as_uri(), str(tmp_path), False) == [["done"]]
        files = {path.relative_to(near): path.read_bytes() for path in near.rglob("*") if path.is_file()}
        copied = {path.relative_to(far / "0.5") for path in (far / "0.5").rglob("*") if path.is_file()}
        assert copied == files.keys() and all((far / "0.5" / name).read_bytes() == files[name] for name in files)
        (far / "0.5" / "model" / "config.json").write_text("{")  # of a copy that was cut off


class Unreachable(MemoryFileSystem):
    """Of another file system's kinds of errors, some are no OSError: s3fs lets botocore's through."""

    protocol = "unreachable"
    is_down = True

    def put(self, *arguments: Any, **options: Any) -> Any:
        if self.is_down:
            raise RuntimeError("no answer from https://me:hunter2secret@host")
        return super().put(*arguments, **options)


def test_a_place_that_cannot_be_reached_ends_no_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register_implementation("unreachable", Unreachable, clobber=True)
    sweep = read_sweep(sweep_file(tmp_path, vary={"leap.target": [0.5]}))
    line = Line(sweep, trials_of(sweep), Storage("unreachable://far", tmp_path), "accuracy")
    assert line.take(None) is not None
    run_folder(tmp_path / "0.5")
    line.end("0.5", Outcome("done", 1.0))
    line.publish()
    told = capsys.readouterr().out
    assert told.count("could not be written: no answer from https://***@host; make room, and run the same command") == 2
    monkeypatch.setattr(Unreachable, "is_down", False)
    line.publish()
    (copy,) = (file for path, file in Unreachable.store.items() if path.endswith("far/0.5/certificate.json"))
    assert copy.getvalue() == (tmp_path / "0.5" / "certificate.json").read_bytes()
    assert line.storage.lacking(["0.5"]) == [] and capsys.readouterr().out == ""
