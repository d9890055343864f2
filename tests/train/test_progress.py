"""What a run shows: plain lines into a pipe, a bar on a terminal, nothing on other ranks."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator

import pytest
from rich.console import Console

from leap_dist import console
from leap_dist.console import summary_table
from leap_dist.train import progress
from leap_dist.train.progress import Progress
from leap_dist.train.summary import shown

FIELDS = {"loss": 0.41237, "R": 0.5, "target": 0.05, "density": 0.51, "lambda": 10.0, "units": 12}


@pytest.fixture(autouse=True)
def _fresh_console() -> Iterator[None]:
    console.console.cache_clear()
    yield
    console.console.cache_clear()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as one number that a test may change."""
    now = [100.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    return now


def test_plain_line_tells_everything(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(total=1000, enabled=True) as shown:
        clock[0] += 2.0
        shown.update(5, "prune", FIELDS)
    fields = "loss 0.4124  R 0.5 → 0.05  density 0.51  lambda 10  units 12"
    assert capsys.readouterr().out == f"step 5/1000  prune  {fields}  2.5 steps/s  ETA 6:38\n"


def test_plain_lines_come_at_most_every_five_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(total=21, enabled=True) as shown:
        for step in range(1, 22):
            clock[0] += 1.0
            shown.update(step, "dense", {})
    steps = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert steps == ["1/21", "6/21", "11/21", "16/21", "21/21"]


def test_last_step_is_always_shown(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(total=2, enabled=True) as shown:
        shown.update(1, "dense", {})
        shown.update(2, "settle", {})
    shown_steps = [line.split()[1:3] for line in capsys.readouterr().out.splitlines()]
    assert shown_steps == [["1/2", "dense"], ["2/2", "settle"]]


def test_what_is_done_aside_is_shown_only_where_it_takes_long(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for total in (4, 12):
        with Progress(total=total, enabled=True, aside=True) as shown:
            for step in range(1, total + 1):
                clock[0] += 1.0
                shown.update(step, "evaluate", {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["5/12", "10/12", "12/12"]
    assert lines[0] == "step 5/12  evaluate    1 steps/s  ETA 0:07"


def test_resumed_run_counts_its_own_steps(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(total=5000, enabled=True, start=1000) as shown:
        clock[0] += 10.0
        shown.update(1010, "prune", {})
    assert "1 steps/s  ETA 1:06:30" in capsys.readouterr().out


def test_rate_follows_the_recent_steps(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress(total=200, enabled=True)
    for step in range(1, 101):
        clock[0] += 10.0 if step <= 40 else 0.5
        shown.update(step, "dense", {})
    clock[0] += 5.0
    shown.update(200, "dense", {})
    assert float(capsys.readouterr().out.splitlines()[-1].split(" steps/s")[0].split()[-1]) > 2


def test_no_time_has_passed(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    Progress(total=3, enabled=True).update(1, "dense", {"R": 1.0})
    assert capsys.readouterr().out == "step 1/3  dense  R 1  - steps/s  ETA -\n"


def test_long_lines_and_brackets_stay_as_they_are(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    fields = {f"[red]measure{i}[/red]": 1.0 for i in range(12)}
    Progress(total=3, enabled=True).update(1, "dense", fields)
    (line,) = capsys.readouterr().out.splitlines()
    assert len(line) > console.PLAIN_WIDTH and "[red]measure11[/red] 1" in line


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(total=3, enabled=False) as shown:
        shown.update(3, "settle", FIELDS)
    assert capsys.readouterr() == ("", "")


def test_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=160)
    monkeypatch.setattr(progress, "console", lambda: terminal)
    with pytest.raises(KeyboardInterrupt), Progress(total=10, enabled=True) as shown:
        clock[0] += 1.0
        shown.update(4, "prune", FIELDS)
        raise KeyboardInterrupt
    text = screen.getvalue()
    for part in ("prune", "4/10", "R 0.5 → 0.05", "4 steps/s  ETA 0:02", "━"):
        assert part in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is shown again, also after an interrupt


def test_an_evaluation_has_a_bar_below_that_of_the_run(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=160)
    monkeypatch.setattr(progress, "console", lambda: terminal)
    with Progress(total=10, enabled=True) as run:
        run.update(4, "dense", {})
        with Progress(total=8, enabled=True, aside=True) as short:
            short.update(8, "not shown", {})
        with Progress(total=8, enabled=True, aside=True) as long:
            clock[0] += 6.0
            long.update(2, "evaluate", {})
            time.sleep(0.5)  # bars are drawn ten times a second
        run.update(5, "prune", {})
    text = screen.getvalue()
    assert "not shown" not in text and text.index("evaluate") < text.index("prune") and "2/8" in text


def test_summary_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, str | float]] = [
        {"model": "dense", "accuracy": 0.912345, "kept": 1000},
        {"model": "pruned [0.1]", "accuracy": 0.9, "density": 0.1},
    ]
    summary_table(rows, title="run")
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert ["dense", "0.9123", "1000", ""] in cells
    assert ["pruned [0.1]", "0.9", "", "0.1"] in cells


def test_the_table_has_bits_per_byte_beside_a_perplexity() -> None:
    measured = {"perplexity": 45.5, "bits_per_byte": 1.3, "accuracy": 0.4, "loss": 3.8}
    assert shown("perplexity", measured) == {"perplexity": 45.5, "bits_per_byte": 1.3}
    assert shown("accuracy", {"accuracy": 0.9, "loss": 0.1}) == {"accuracy": 0.9}
