"""The results of a sweep as a table, a page, pictures, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from leap_dist.files import write_text
from leap_dist.run_folder import REPORT
from leap_dist.sweep.grid import Settings, short, varying
from leap_dist.sweep.result import SEED, TASK, Mean, Result, means
from leap_dist.sweep.sweep_file import TARGET
from leap_dist.tracking.pareto import Point, picture_of
from leap_dist.tracking.plots import Picture, save_all
from leap_dist.tracking.report import Entry, write_page
from leap_dist.tracking.slices import Slice, slices

RESULTS, PICTURE, SEARCHED = "results.json", "results", "settings"
FRONT = "*"
MOST_SETTINGS = 3  # columns, with the target, beside which a terminal has room for all others


def table_lines(results: Sequence[Result], metric: str, gpus: int) -> list[dict[str, str | float]]:
    """The results as lines of a table; of the settings those that differ, and the target.

    Headers have spaces, at which they wrap. Beside many settings there is no room for weights and LEAP's time, which
    results.json and the page have.
    """
    shown = varying([result.settings for result in results]) | {TARGET}
    many = len(shown) > MOST_SETTINGS
    hours = "GPU hours" if gpus else "CPU hours"
    alike = not gpus and all(math.isclose(3600 * (r.cost or 0.0), r.seconds or 0.0) for r in results)  # one CPU a trial
    columns = {"parameters": "parameters", "latency": "latency ms"} | ({} if many else {"leap_ms": "LEAP ms"})
    exported = {field: title for field, title in columns.items() if any(getattr(r, field) is not None for r in results)}
    return [
        {
            "front": FRONT if result.front else "",
            **{key.replace("_", " "): value for key, value in _cells(result.settings, shown).items()},
            "density": _number(result.density),
            metric: _number(result.value),
            "Δ dense": _number(_difference(result)),
            **({} if many else {"weights": _number(result.weights)}),
            **{title: _number(getattr(result, field)) for field, title in exported.items()},
            "seconds": _number(result.seconds),
            **({} if alike else {hours: _number(result.cost)}),
            "outcome": result.outcome,
        }
        for result in results
    ]


def mean_lines(found: Sequence[Mean], metric: str) -> list[dict[str, str | float]]:
    """The means over seeds as lines of a table, with the settings in which they differ."""
    shown = varying([mean.settings for mean in found])
    return [
        {
            **_cells(mean.settings, shown),
            "density": mean.density,
            f"{metric}, mean": mean.value,
            "spread": mean.spread,
            "seeds": mean.num,
            "dense": _number(mean.dense),
        }
        for mean in found
    ]


def _cells(settings: Settings, shown: set[str]) -> dict[str, str | float]:
    return {key.rpartition(".")[2]: short(value) for key, value in settings.items() if key in shown}


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
    entries = [_entry(result, folder / result.name) for result in results]
    write_page(entries, metric, f"Sweep {folder.resolve().name}", picture, folder / REPORT, searched=settings)
    drawn = save_all(picture, folder / PICTURE) if picture else []
    drawn += save_all(settings, folder / SEARCHED) if settings else []
    return [RESULTS, REPORT, *(file.name for file in drawn)]


def _entry(result: Result, folder: Path) -> Entry:
    return Entry(
        result.name,
        result.outcome,
        {key.rpartition(".")[2]: str(short(value)) for key, value in result.settings.items() if key != TARGET},
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
    keys = sorted(varying([result.settings for result, _, _ in done]))
    found = [Slice(key, [short(result.settings[key]) for result, _, _ in done], importance.get(key)) for key in keys]
    return slices(found, metric, [value for _, value, _ in done], [density for _, _, density in done]) if keys else None


def _points(results: Sequence[Result], searched: bool) -> list[Point]:
    """What there is to draw, means over seeds: a panel a task, a line for each other setting that varies.

    Of a search, where hardly two trials share a setting, the trials alone.
    """
    points, shown = [], varying([result.settings for result in results]) - {TARGET, TASK, SEED}
    for mean in means(results):
        task = str(mean.settings.get(TASK, "all trials"))
        line = "trials" if searched else ", ".join(map(str, _cells(mean.settings, shown).values())) or "pruned"
        dense = None if searched else mean.dense  # each trial has another one
        points.append(Point(task, line, mean.density, mean.value, dense, mean.spread))
    return points
