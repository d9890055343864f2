"""The journal: what it keeps over a killed process, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leap_dist.errors import UserError
from leap_dist.run_folder import JOURNAL
from leap_dist.tracking import journal as journal_module
from leap_dist.tracking.journal import Journal


def closed(journal: Journal) -> Journal:
    """As a killed process leaves it: nothing is written at the end."""
    journal.close(remove=False)
    return journal


def test_what_was_noted_and_not_taken_is_there_after_a_kill(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    first.describe(experiment="leap")
    first.describe(run_id="abc")
    for step in (1, 2, 3):
        first.add("metrics", step=step, values={"loss": float("nan") if step == 2 else 1.0 / step})
    first.taken(first.waiting()[:1])
    file = closed(first).path
    assert file is not None
    file.write_text(file.read_text() + '{"id": 3, "kind": "met')  # a line that the kill cut off
    second = Journal(tmp_path)
    assert second.run == {"experiment": "leap", "run_id": "abc"}
    assert [(record["id"], record["step"]) for record in second.waiting()] == [(1, 2), (2, 3)]
    assert second.waiting()[0]["values"]["loss"] != second.waiting()[0]["values"]["loss"]
    second.add("status", status="FAILED")
    closed(second)
    assert [record["id"] for record in closed(Journal(tmp_path)).waiting()] == [1, 2, 3]


def test_a_metric_is_noted_once_a_step(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    first.add("metrics", step=20, values={"loss": 1.0})
    first.taken(first.waiting())
    again = closed(first) and Journal(tmp_path)
    assert again.new_metrics(20, {"loss": 0.9, "accuracy": 0.5}) == {"accuracy": 0.5}
    assert again.new_metrics(10, {"loss": 0.9}) == {} and again.new_metrics(30, {"loss": 0.9}) == {"loss": 0.9}
    closed(again)


def test_the_file_stays_short_and_goes_when_all_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "LONG", 1000)
    journal = Journal(tmp_path)
    journal.describe(run_id="abc")
    for step in range(100):
        journal.add("metrics", step=step, values={"loss": 1.0})
        if step % 10 == 9:
            journal.taken(journal.waiting())
    assert (tmp_path / JOURNAL).stat().st_size < 1500 and [path.name for path in tmp_path.iterdir()] == [JOURNAL]
    with pytest.raises(UserError, match=r"mlflow.jsonl: another process is sending these records to MLflow; wait"):
        Journal(tmp_path)
    journal = closed(journal) and Journal(tmp_path)
    assert journal.run == {"run_id": "abc"} and journal.new_metrics(99, {"loss": 1.0}) == {}
    journal.add("status", status="FINISHED")
    assert journal.waiting()[0]["id"] == 100
    journal.close(remove=True)
    assert (tmp_path / JOURNAL).is_file()  # something is waiting
    journal = Journal(tmp_path)
    journal.taken(journal.waiting())
    journal.close(remove=True)
    assert not list(tmp_path.iterdir())
    journal.add("status", status="FAILED")  # closed: nothing is written
    journal.close(remove=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", ["no JSON", "3", json.dumps({"kind": "metrics"})])
def test_a_damaged_file_is_the_users_error(line: str, tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text(f"{line}\n")
    with pytest.raises(
        UserError, match=r"mlflow.jsonl: damaged, it is not a journal of MLflow records: .*; restore or"
    ):
        Journal(tmp_path)
    (tmp_path / JOURNAL).write_text("")
    Journal(tmp_path).close(remove=True)


def test_without_a_folder_it_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    journal = Journal(None)
    journal.add("status", status="FAILED")
    assert len(journal.waiting()) == 1
    journal.close(remove=True)
    assert not list(tmp_path.iterdir())
