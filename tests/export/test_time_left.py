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


def lines(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    progress: TimeLeft,
    steps: list[tuple[float, float]],
) -> list[str]:
    """What is said of steps of (time of their begin, work)."""
    times = iter([at for at, _ in steps])
    monkeypatch.setattr(time_left.time, "monotonic", lambda: next(times))
    for _, work in steps:
        progress.begin("x", work)
    return [line.removeprefix("x (")[:-1] for line in capsys.readouterr().err.splitlines()]


def test_no_time_is_told_before_a_twentieth_is_done_and_the_first_step_is_left_out_of_the_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two minutes for the first unit of work, which finds everything cold; a second for each of the others."""
    steps = [(0.0, 0.0), (60.0, 1.0), (180.0, 3.0), (183.0, 6.0), (189.0, 10.0), (199.0, 80.0)]
    said = lines(monkeypatch, capsys, TimeLeft(100.0), steps)
    assert said == ["0% done"] * 2 + ["1% done", "4% done", "10% done, about 1:30 left", "20% done, about 1:20 left"]


def test_the_share_never_falls(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At ten seconds for a unit the optional step would be skipped; then it turns out to be fast."""
    progress = TimeLeft(20.0, [(100.0, 5.0, 20.0)])
    said = lines(monkeypatch, capsys, progress, [(0.0, 1.0), (10.0, 1.0), (20.0, 8.0), (21.0, 2.0), (22.0, 2.0)])
    shares = [int(line.partition("%")[0]) for line in said]
    assert shares == [0, 5, 10, 10, 10]
