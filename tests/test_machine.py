"""What a run says of where it ran."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from leap_dist import machine


def git(folder: Path, *command: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *who, "-C", str(folder), *command], check=True, capture_output=True, text=True).stdout


def test_a_commit_is_that_of_the_package_and_no_other_projects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = tmp_path / "leap_dist" / "machine.py", tmp_path / ".venv" / "leap_dist" / "machine.py"
    for file in (ours, theirs):
        file.parent.mkdir(parents=True)
        file.write_text("")
    (tmp_path / ".gitignore").write_text(".venv\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "All")
    monkeypatch.setattr(machine, "__file__", str(ours))
    assert machine._commit() == git(tmp_path, "rev-parse", "--short=12", "HEAD").strip()
    monkeypatch.setattr(machine, "__file__", str(theirs))
    assert machine._commit() is None
