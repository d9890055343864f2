"""A finished run as a row: what it is compared by, as a line of a table, for programs, in a picture and on a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_dist.run_folder import Export
from leap_dist.tracking.pareto import Point, group_names
from leap_dist.tracking.runs import FOLDER, StoredRun

if TYPE_CHECKING:
    from leap_dist.tracking.report import Entry

PRUNED, DENSE, DENSITY = "pruned_", "dense_", "pruned_density"
TARGET, TASK, RULE, SEED = "leap.target", "data.task", "leap.rule", "train.seed"
NOT_RECORDED = "data not recorded"
GATES = "leap.gates"  # of the tag: granularities alone; the parameter has all options


@dataclass(frozen=True)
class Row:
    """A finished run and what it is compared by. value, dense: of the metric; overhead: LEAP's ms per pruning step.

    What an older version did not log, and what is not a number, is None. export: the fastest in the run's folder; None
    without any, or where the folder is on another machine.
    """

    run: StoredRun
    density: float
    value: float | None
    dense: float | None
    export: Export | None = None
    front: bool = False

    @property
    def target(self) -> float:
        """The density that was asked for."""
        return float(self.run.params[TARGET])

    @property
    def task(self) -> str:
        """Models of several tasks cannot be compared."""
        return self.run.params.get(TASK, "")

    @property
    def group(self) -> tuple[str, str]:
        """Only models of one task, judged on the same data, can be compared."""
        return self.task, self.run.data

    @property
    def difference(self) -> float | None:
        """What pruning cost."""
        return None if self.value is None or self.dense is None else self.value - self.dense

    @property
    def kept(self) -> int | None:
        """Prunable weights that are left."""
        return None if (kept := number(self.run, "kept_weights")) is None else round(kept)

    @property
    def overhead(self) -> float | None:
        """Milliseconds of LEAP in a step of the prune phase."""
        return number(self.run, "leap_ms")


def table_lines(rows: Sequence[Row], metric: str) -> list[dict[str, str | float]]:
    """The rows as lines of a table; a cell without a value is left out."""
    names = group_names([row.group for row in rows], NOT_RECORDED)
    lines = []
    for row in rows:
        cells: dict[str, Any] = {"front": "*" if row.front else "", "run": row.run.name, "id": row.run.id[:8]}
        cells |= {"task": names[row.group]} if len(names) > 1 else {}
        cells |= {"target": row.target, "density": row.density, metric: row.value, "Δ dense": row.difference}
        cells |= {"weights": row.kept, "LEAP ms": row.overhead, "seconds": row.run.seconds}
        if row.export:
            size = row.export.bytes / 1e6
            cells |= {"parameters": row.export.parameters, "MB": size, "latency ms": row.export.latency}
        lines.append({name: value for name, value in cells.items() if value is not None})
    return lines


def records(rows: Sequence[Row], metric: str) -> list[dict[str, Any]]:
    """The rows for programs: every key in every record, ids in full."""
    return [
        {
            "run": row.run.name,
            "id": row.run.id,
            "task": row.task,
            "data": row.run.data,
            "target": row.target,
            "density": row.density,
            "metric": metric,
            "value": row.value,
            "dense": row.dense,
            "difference": row.difference,
            "kept_weights": row.kept,
            "export": row.export and row.export.kind,
            "parameters": row.export and row.export.parameters,
            "bytes": row.export and row.export.bytes,
            "latency_ms": row.export and row.export.latency,
            "leap_ms": row.overhead,
            "seconds": row.run.seconds,
            "front": row.front,
        }
        for row in rows
    ]


def points(rows: Sequence[Row]) -> list[Point]:
    """The rows with a value, in the picture: runs of a line differ in their target alone, or in what is not shown."""
    names = group_names([row.group for row in rows], NOT_RECORDED)
    return [
        Point(
            names[row.group] or "all runs",
            ", ".join(text for text in (_rule(row.run), _gates(row.run)) if text) or "pruned",
            row.density,
            row.value,
            row.dense,
        )
        for row in rows
        if row.value is not None
    ]


def entries(rows: Sequence[Row]) -> list[Entry]:
    """The rows on a page of several runs."""
    names = group_names([row.group for row in rows], NOT_RECORDED)
    return [_entry(row, names[row.group]) for row in rows]


def _entry(row: Row, group: str) -> Entry:
    from leap_dist.tracking.report import Entry

    run = row.run
    settings = {"task": group, "gates": _gates(run), "rule": _rule(run), "seed": run.params.get(SEED)}
    return Entry(
        run.name,
        run.status.lower(),
        {name: text for name, text in settings.items() if text},
        row.target,
        row.density,
        row.value,
        row.dense,
        row.kept,
        row.overhead,
        run.seconds,
        row.front,
        folder_of(run),
        parameters=run.params,
    )


def _rule(run: StoredRun) -> str | None:
    """What made the masks; runs of an older version say the rule alone."""
    return run.tags.get(RULE) or run.params.get(RULE)


def _gates(run: StoredRun) -> str:
    return run.tags.get(GATES) or run.params.get(GATES, "")


def folder_of(run: StoredRun) -> Path | None:
    """Where the run's files were written, maybe on another machine."""
    folder = run.tags.get(FOLDER)
    return Path(folder) if folder else None


def number(run: StoredRun, metric: str) -> float | None:
    """A metric of the run; None if it is not there, or no finite number."""
    value = run.metrics.get(metric)
    return None if value is None or not math.isfinite(value) else value
