"""The lines of a long export: the part that is done, and the time that is left at the present rate."""

from __future__ import annotations

import pytest

from leap_dist.export import time_left
from leap_dist.export.time_left import TimeLeft


@pytest.mark.parametrize(("limit", "second"), [(60.0, "20% done, about 0:40 left"), (9.0, "50% done, about 0:10 left")])
def test_a_step_whose_trial_would_take_too_long_is_not_waited_for(
    limit: float, second: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps of 10 of work, ten seconds each; 30 more are optional, after a trial of 10."""
    seconds = iter([0.0, 10.0])  # made, second line
    monkeypatch.setattr(time_left.time, "monotonic", lambda: next(seconds))
    progress = TimeLeft(20.0, [(30.0, 10.0, limit)])
    progress.of = "shrunk"
    progress.begin("comparing", 10.0)
    progress.begin("writing", 10.0)
    assert capsys.readouterr().err.splitlines() == ["shrunk: comparing (0% done)", f"shrunk: writing ({second})"]


def test_more_work_than_was_counted_is_never_less_than_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([0.0, 10.0])
    monkeypatch.setattr(time_left.time, "monotonic", lambda: next(seconds))
    progress = TimeLeft(5.0)
    progress.begin("comparing", 10.0)
    progress.begin("writing", 10.0)
    assert capsys.readouterr().err.splitlines() == ["comparing (0% done)", "writing (100% done)"]
