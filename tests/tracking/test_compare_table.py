"""The table of compared runs in a console that is narrow, or wide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from leap_dist.console import console, short_number, summary_table
from leap_dist.tracking.compare import Request, compare
from leap_dist.tracking.runs import StoredRun
from tests.tracking.folders import export_card
from tests.tracking.test_compare import TABLE, of_task, stored


def mixed(folder: Path) -> list[StoredRun]:
    """Runs of two tasks, one of which has an export."""
    export_card(folder / "a", "onnx", 12.345678)
    long = {"kept_weights": 2_033_000.0, "leap_ms": 5.0, "pruned_density": 0.1234567, "dense_accuracy": 0.95}
    runs = [
        stored(f"run-of-a-longer-name-{i}", 0.1, {**long, "pruned_accuracy": 0.8123456 + i / 100}) for i in range(3)
    ]
    cls = of_task(stored("base", 0.1, {**long, "pruned_accuracy": 0.7}, folder=str(folder / "a")), task="builtin/clock")
    return [*(of_task(run, task="text/classification") for run in runs), replace(cls, seconds=100.0)]


@pytest.mark.parametrize(
    ("width", "no_room", "last"),
    [
        (120, "seconds, MB, parameters", ["density", "accuracy", "Δ dense", "latency ms"]),
        (80, "seconds, MB, parameters, latency ms, Δ dense, id", ["density", "accuracy"]),
    ],
)
def test_a_narrow_table_has_whole_numbers_and_headings(
    width: int, no_room: str, last: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console(), "width", width)
        answer = compare(mixed(tmp_path), Request())
        ((title, lines),) = answer.tables.items()
        summary_table(lines, title=title)
    same, told = "in all rows: LEAP ms 5, weights 2033000, target 0.1", f"no room for {no_room}"
    assert title == f"{TABLE}\n{same}\n{told}: --csv and --json have them"
    assert list(lines[0])[-len(last) :] == last and len(answer.records[0]) == 18
    shown = capsys.readouterr().out
    words = [word for name in lines[0] for word in name.split()]
    cells = [short_number(value) for line in lines for value in line.values()]
    assert all(text in shown for text in (*words, *cells)) and max(map(len, shown.splitlines())) <= width


def test_a_wide_table_has_all_but_what_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console(), "width", 180)
    runs = mixed(tmp_path)
    ((title, lines),) = compare(runs, Request()).tables.items()
    assert title == TABLE and {*lines[0]} > {"seconds", "LEAP ms", "latency ms"}
    older = [replace(run, metrics={"pruned_accuracy": 0.5, "density": 0.1}, tags={}, seconds=None) for run in runs]
    ((_, lines),) = compare(older[:2], Request()).tables.items()
    assert list(lines[0]) == ["front", "run", "id", "target", "density", "accuracy"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2033000, "2033000"), (-2.033e6, "-2.03M"), (999_700_000.0, "1B"), (1e14, "100T"), (100_000.0, "1e+05"),
        (2033000.6, "2.033e+06"), (float("inf"), "inf"), (0, "0"), (0.123456, "0.1235"), ("1e6", "1e6"),
    ],
)  # fmt: skip
def test_large_counts_are_short(value: str | float, text: str) -> None:
    assert short_number(value) == text
