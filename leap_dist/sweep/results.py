"""The results of a sweep as a table, a page, pictures, and as JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from leap_dist.console import console, fitting, summary_table
from leap_dist.files import write_text
from leap_dist.run_folder import REPORT
from leap_dist.sweep.grid import Settings, varying, written
from leap_dist.sweep.result import Mean, Result, means
from leap_dist.sweep.sweep_file import TARGET
from leap_dist.tracking.pareto import Point, group_names, picture_of
from leap_dist.tracking.plots import Picture, save_all
from leap_dist.tracking.report import Entry, write_page
from leap_dist.tracking.slices import Slice, slices

RESULTS, PICTURE, SEARCHED = "results.json", "results", "settings"
FRONT = "*"
SPARE = ("weights", "LEAP ms", "seconds", "GPU hours", "CPU hours", "parameters", "Δ dense", "latency ms", "outcome")
"""Columns of the table that go first where the console has no room for all."""
TITLES = {"front", "trial", "run", "status", "outcome", "folder", "target", "density", "dense", "Δ dense", "weights"}
TITLES |= {"weights kept", "parameters", "latency ms", "latency, ms", "LEAP ms", "LEAP, ms", "MB", "seconds", "seeds"}
TITLES |= {"GPU hours", "CPU hours", "spread"}
"""Of columns that tables and the page have beside the metric and the settings."""


def print_table(results: Sequence[Result], metric: str, gpus: int, title: str) -> None:
    """The table, with what the console has room for."""
    if not results:
        console().print("no trial has run: the budget was used up before, or no settings make a valid job")
        return
    lines, alike, no_room = fitting(table_lines(results, metric, gpus), SPARE)
    heads = [f"{title}: {metric}; * on the Pareto front"]
    heads += [f"in all trials: {', '.join(f'{name} {value}' for name, value in alike.items())}"] if alike else []
    heads += [f"no room for {', '.join(no_room)}: {RESULTS} has them"] if no_room else []
    summary_table(lines, title="\n".join(heads))


def table_lines(results: Sequence[Result], metric: str, gpus: int) -> list[dict[str, str | float]]:
    """The results as lines of a table; of the settings those that differ, and the target.

    Headers have spaces, at which they wrap.
    """
    settings = [result.settings for result in results]
    shown = varying(settings) | {TARGET}
    hours = "GPU hours" if gpus else "CPU hours"
    alike = not gpus and all(math.isclose(3600 * (r.cost or 0.0), r.seconds or 0.0) for r in results)  # one CPU a trial
    columns = {"parameters": "parameters", "latency": "latency ms", "leap_ms": "LEAP ms"}
    exported = {field: title for field, title in columns.items() if any(getattr(r, field) is not None for r in results)}
    return [
        {
            "front": FRONT if result.front else "",
            "trial": result.name,
            **cells,
            "density": _number(result.density),
            metric: _number(result.value),
            "Δ dense": _number(_difference(result)),
            "weights": _number(result.weights),
            **{title: _number(getattr(result, field)) for field, title in exported.items()},
            "seconds": _number(result.seconds),
            **({} if alike else {hours: _number(result.cost)}),
            "outcome": result.outcome,
        }
        for result, cells in zip(results, _cells(settings, metric, shown), strict=True)
    ]


def mean_lines(found: Sequence[Mean], metric: str) -> list[dict[str, str | float]]:
    """The means over seeds as lines of a table, with the settings in which they differ."""
    settings = [mean.settings for mean in found]
    return [
        {
            **cells,
            "density": mean.density,
            f"{metric}, mean": mean.value,
            "spread": mean.spread,
            "seeds": mean.num,
            "dense": _number(mean.dense),
        }
        for mean, cells in zip(found, _cells(settings, metric, varying(settings)), strict=True)
    ]


def _cells(settings: Sequence[Settings], metric: str, shown: set[str]) -> list[dict[str, str | float]]:
    """Of each trial the settings that are shown, by the titles of their columns."""
    titles = _titles(settings, metric)
    return [{titles[key]: value for key, value in row.items() if key in shown} for row in written(settings)]


def _titles(settings: Sequence[Settings], metric: str) -> dict[str, str]:
    """The last part of each key; the whole key where that is the last part of another one or a title of its own."""
    last = {key: key.rpartition(".")[2].replace("_", " ") for row in settings for key in row}
    times, taken = Counter(last.values()), TITLES | {metric}
    return {
        key: name if key == TARGET or (times[name] == 1 and name not in taken) else key for key, name in last.items()
    }


def _number(value: float | None) -> str | float:
    return "" if value is None else value


def _difference(result: Result) -> float | None:
    return None if result.value is None or result.dense is None else result.value - result.dense


def write(
    results: Sequence[Result],
    metric: str,
    folder: Path,
    searched: bool = False,
    importance: Mapping[str, float] | None = None,
) -> list[str]:
    """results.json, the page and, if there is anything to draw, the pictures; the names of the files.

    searched: draw the settings of a search, too; importance: how much of the metric each explains, if that is known.
    """
    found = {"metric": metric, "trials": [asdict(result) for result in results]}
    text = json.dumps(found | ({"importance": importance} if importance else {}), indent=1)
    write_text(folder / RESULTS, text + "\n")
    points = _points(results, searched)
    picture = picture_of(points, metric) if points else None
    settings = _slices(results, metric, importance or {}) if searched and points else None
    rows = [result.settings for result in results]
    cells = _cells(rows, metric, {key for row in rows for key in row if key != TARGET})
    entries = [_entry(result, row, folder / result.name) for result, row in zip(results, cells, strict=True)]
    write_page(entries, metric, f"Sweep {folder.resolve().name}", picture, folder / REPORT, searched=settings)
    drawn = save_all(picture, folder / PICTURE) if picture else []
    drawn += save_all(settings, folder / SEARCHED) if settings else []
    return [RESULTS, REPORT, *(file.name for file in drawn)]


def _entry(result: Result, settings: Mapping[str, str | float], folder: Path) -> Entry:
    return Entry(
        result.name,
        result.outcome,
        {title: str(value) for title, value in settings.items()},
        result.target,
        result.density,
        result.value,
        result.dense,
        result.weights,
        result.leap_ms,
        result.seconds,
        result.front,
        folder,
        result.error,
    )


def _slices(results: Sequence[Result], metric: str, importance: Mapping[str, float]) -> Picture | None:
    """The metric over each setting that differs."""
    done = [(r, r.value, r.density) for r in results if r.value is not None and r.density is not None]
    settings = [result.settings for result, _, _ in done]
    keys, rows = sorted(varying(settings)), written(settings)
    found = [Slice(key, [row[key] for row in rows], importance.get(key)) for key in keys]
    return slices(found, metric, [value for _, value, _ in done], [density for _, _, density in done]) if keys else None


def _points(results: Sequence[Result], searched: bool) -> list[Point]:
    """What there is to draw, means over seeds: a panel for what can be compared, a line for each other setting that
    varies in it.

    Of a search, where hardly two trials share a setting, the trials alone.
    """
    found = means(results)
    groups, lines = [mean.group for mean in found], _lines(found)
    panels = group_names(groups, "its own data") if len(set(groups)) > 1 else dict.fromkeys(groups, "all trials")
    return [
        Point(
            panels[mean.group],
            "trials" if searched else line,
            mean.density,
            mean.value,
            None if searched else mean.dense,  # each trial has another one
            mean.spread,
        )
        for mean, line in zip(found, lines, strict=True)
    ]


def _lines(found: Sequence[Mean]) -> list[str]:
    """What to call the line of each mean: the values in which those of a panel differ, with their keys where not all
    means have the same ones."""
    groups = {mean.group for mean in found}
    shown = {key for group in groups for key in varying([mean.settings for mean in found if mean.group == group])}
    cells = _cells([mean.settings for mean in found], "", shown - {TARGET})
    alike = len({tuple(row) for row in cells}) <= 1
    return [", ".join(str(v) if alike else f"{key} {v}" for key, v in row.items()) or "pruned" for row in cells]
