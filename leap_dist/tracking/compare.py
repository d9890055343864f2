"""Finished runs side by side: rows of a table, the Pareto front, the smallest that is good enough, what differs."""

from __future__ import annotations

import csv
import json
import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from leap_dist.errors import UserError
from leap_dist.tracking.mlflow import differing
from leap_dist.tracking.pareto import LOWER_IS_BETTER, Point, draw, higher_is_better, pareto
from leap_dist.tracking.runs import StoredRun

PRUNED, DENSE, DENSITY = "pruned_", "dense_", "pruned_density"
TARGET, TASK = "leap.target", "data.task"
NOT_SET = "(not set)"
PICTURES = (".png", ".svg")
MOST_NAMED = 5  # runs in one part of a message
OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True)
class Row:
    """A finished run and what it is compared by. value, dense: of the metric; overhead: LEAP's ms per pruning step.

    What an older version did not log, and what is not a number, is None.
    """

    run: StoredRun
    density: float
    value: float | None
    dense: float | None
    front: bool = False

    @property
    def target(self) -> float:
        """The density that was asked for."""
        return float(self.run.params[TARGET])

    @property
    def task(self) -> str:
        """Only models of one task can be compared."""
        return self.run.params.get(TASK, "")

    @property
    def difference(self) -> float | None:
        """What pruning cost."""
        return None if self.value is None or self.dense is None else self.value - self.dense

    @property
    def kept(self) -> int | None:
        """Prunable weights that are left."""
        return None if (kept := _number(self.run, "kept_weights")) is None else round(kept)

    @property
    def overhead(self) -> float | None:
        """Milliseconds of LEAP in a step of the prune phase."""
        return _number(self.run, "leap_ms")


@dataclass(frozen=True)
class Request:
    """What to make of the runs. best: a condition as `parse_condition` takes it; plot: the picture's file."""

    metric: str | None = None
    best: str | None = None
    pareto: bool = False
    masks: bool = False
    plot: Path | None = None

    def __post_init__(self) -> None:
        """Raises UserError before anything is read."""
        if self.best is not None:
            parse_condition(self.best)
        if self.plot is not None and self.plot.suffix not in PICTURES:
            raise UserError(f"--plot: got {self.plot}; allowed: a file that ends in {' or '.join(PICTURES)}")


@dataclass(frozen=True)
class Answer:
    """tables: what to show, by title. records: the first table for programs. notes: what to say besides."""

    tables: dict[str, list[dict[str, str | float]]]
    records: list[dict[str, Any]]
    notes: list[str]


@dataclass(frozen=True)
class Condition:
    """What a pruned model has to reach: "accuracy>=0.9"."""

    metric: str
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.bound:g}"

    def holds(self, row: Row) -> bool:
        """Whether the run of a row reaches it."""
        value = _number(row.run, PRUNED + self.metric)
        return value is not None and bool(OPERATORS[self.sign](value, self.bound))


def parse_condition(text: str) -> Condition:
    """--best. Raises UserError for what is no condition."""
    found = re.fullmatch(r"\s*(?:pruned_)?([\w.\-/]+?)\s*(>=|<=|>|<)\s*(\S+)\s*", text)
    try:
        bound = float(found[3]) if found else math.nan
    except ValueError:
        bound = math.nan
    if found is None or not math.isfinite(bound):
        raise UserError(
            f'--best: got "{text}"; allowed: a metric, one of {" ".join(OPERATORS)}, and a number, such as '
            '"accuracy>=0.9"'
        )
    return Condition(found[1], found[2], bound)


def compare(runs: Sequence[StoredRun], request: Request, all_named: bool = False) -> Answer:
    """The table of the finished runs, and what else was asked for; the picture has all runs, also with --best.

    all_named: each run was named, so that one without a result is an error. Raises UserError.
    """
    condition = parse_condition(request.best) if request.best else None
    done, left_out = finished(runs, all_named)
    reached = choose_metric(done, condition.metric) if condition else None
    metric = choose_metric(done, request.metric or reached)
    rows = rows_of(done, metric)
    notes = [f"left out: {why}" for why in left_out]
    if request.plot is not None:
        plot(rows, metric, request.plot)
        notes.append(f"picture: {request.plot}")
    shown = [row for row in rows if row.front or not request.pareto]
    title = f"{metric}; * on the Pareto front"
    if condition:
        found = best(rows, condition)
        if found is None:
            return Answer({}, [], [*notes, nearest_miss(rows, condition)])
        shown, title = [found], f"the smallest density with {condition}"
    tables = {title: table(shown, metric)}
    if request.masks:
        from leap_dist.tracking.overlap import overlaps  # torch, which tables do without

        tables["overlap of masks: weights that both keep / weights that either keeps"] = overlaps(
            [row.run for row in (rows if condition else shown)]
        )
    return Answer(tables, records(shown, metric), notes)


def finished(runs: Sequence[StoredRun], asked_for: bool) -> tuple[list[StoredRun], list[str]]:
    """(the runs that came to their end, why each other job is left out).

    asked_for: each run was named, so that leaving one out is an error. Raises UserError then, and if none is left.
    """
    jobs = [run for run in runs if asked_for or TARGET in run.params]  # a sweep's own run has no target
    lacking = {run.id: why for run in jobs if (why := _unfinished(run))}
    done = [run for run in jobs if run.id not in lacking]
    problems = _first(list(lacking.values()))
    if lacking and (asked_for or not done):
        raise UserError("\n  ".join(problems))
    if not done:
        raise UserError(f"none of the {len(runs)} runs is a pruning job: they have no {TARGET}")
    return done, problems


def _unfinished(run: StoredRun) -> str:
    """Why a run has no result; "" if it has one."""
    if TARGET not in run.params:
        return f"{run.label} is no pruning job: it has no {TARGET}"
    if metrics_of(run) and _density(run) is not None:
        return ""
    return f"{run.label} has no density of a pruned model: it did not finish, its status is {run.status}"


def metrics_of(run: StoredRun) -> frozenset[str]:
    """The metrics of the pruned model, by the task's names."""
    return frozenset(name.removeprefix(PRUNED) for name in run.metrics if name.startswith(PRUNED) and name != DENSITY)


def choose_metric(runs: Sequence[StoredRun], asked: str | None) -> str:
    """The metric to compare by: the one asked for, or the first that all runs have, the task's main one before others.

    Raises UserError, which says which run has which, if not all of them have it.
    """
    shared = frozenset.intersection(*map(metrics_of, runs))
    if asked is not None and asked.removeprefix(PRUNED) in shared:
        return asked.removeprefix(PRUNED)
    if asked is None and shared:
        main = {run.tags.get("leap.metric", "") for run in runs}
        return min(shared, key=lambda name: (main != {name}, name.endswith(LOWER_IS_BETTER), name))
    groups: dict[frozenset[str], list[str]] = {}
    for run in runs:
        groups.setdefault(metrics_of(run), []).append(run.name)
    has = [f"{', '.join(sorted(names))}: {', '.join(_first(labels))}" for names, labels in groups.items()]
    problem = f"--metric: not all runs have {asked}" if asked else "the runs have no metric in common"
    raise UserError("\n  ".join([f"{problem}; choose runs of one task, or another metric; they have", *has]))


def rows_of(runs: Sequence[StoredRun], metric: str) -> list[Row]:
    """Finished runs by task and density, those marked that are on the front of their task."""
    rows = []
    for run in runs:
        density = _density(run)
        assert density is not None, run.label
        rows.append(Row(run, density, _number(run, PRUNED + metric), _number(run, DENSE + metric)))
    sign = 1.0 if higher_is_better(metric) else -1.0
    front = pareto([None if row.value is None else (row.task, row.density, sign * row.value) for row in rows])
    marked = [replace(row, front=best) for row, best in zip(rows, front, strict=True)]
    return sorted(marked, key=lambda row: (row.task, row.density, -sign * (row.value or 0.0)))


def best(rows: Sequence[Row], condition: Condition) -> Row | None:
    """The row of smallest density that reaches the condition; the first of equals, None if no row does."""
    return min((row for row in rows if condition.holds(row)), key=lambda row: row.density, default=None)


def nearest_miss(rows: Sequence[Row], condition: Condition) -> str:
    """What to say when no row reaches the condition."""
    name = PRUNED + condition.metric
    values = [(value, row) for row in rows if (value := _number(row.run, name)) is not None]
    if not values:
        return f"no run has {condition}: none has a number there"
    choose = max if condition.sign.startswith(">") else min
    value, row = choose(values, key=lambda pair: pair[0])
    return f"no run has {condition}; the nearest is {value:.4g}, {row.run.label} at density {row.density:.4g}"


def table(rows: Sequence[Row], metric: str) -> list[dict[str, str | float]]:
    """The rows as lines of a table; a cell without a value is left out."""
    several = len({row.task for row in rows}) > 1
    lines = []
    for row in rows:
        cells: dict[str, Any] = {"front": "*" if row.front else "", "run": row.run.name, "id": row.run.id[:8]}
        cells |= {"task": row.task} if several else {}
        cells |= {"target": row.target, "density": row.density, metric: row.value, "Δ dense": row.difference}
        cells |= {"weights": row.kept, "LEAP ms": row.overhead, "seconds": row.run.seconds}
        lines.append({name: value for name, value in cells.items() if value is not None})
    return lines


def records(rows: Sequence[Row], metric: str) -> list[dict[str, Any]]:
    """The rows for programs: every key in every record, ids in full."""
    return [
        {
            "run": row.run.name,
            "id": row.run.id,
            "task": row.task,
            "target": row.target,
            "density": row.density,
            "metric": metric,
            "value": row.value,
            "dense": row.dense,
            "difference": row.difference,
            "kept_weights": row.kept,
            "leap_ms": row.overhead,
            "seconds": row.run.seconds,
            "front": row.front,
        }
        for row in rows
    ]


def differences(one: StoredRun, other: StoredRun) -> Answer:
    """The parameters that two runs differ in, by name."""
    names = (one.name, other.name) if one.name != other.name else (one.id, other.id)
    lines: list[dict[str, str | float]] = [
        {"parameter": key, names[0]: one.params.get(key, NOT_SET), names[1]: other.params.get(key, NOT_SET)}
        for key in differing(one.params, other.params)
    ]
    if not lines:
        return Answer({}, [], [f"{one.label} and {other.label} have the same parameters"])
    return Answer({f"what {one.label} and {other.label} differ in": lines}, lines, [])


def write(answer: Answer, json_target: str | None, csv_path: Path | None) -> None:
    """The records as JSON, "-" for standard output, and as CSV. Raises UserError for what cannot be written."""
    lines = answer.records
    try:
        if json_target == "-":
            print(json.dumps(lines, indent=1))
        elif json_target is not None:
            Path(json_target).write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
        if csv_path is not None:
            with csv_path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(lines[0]) if lines else [])
                writer.writeheader()
                writer.writerows(lines)
    except OSError as error:
        raise UserError(f"--json, --csv: {error.filename} cannot be written: {error.strerror}") from error


def plot(rows: Sequence[Row], metric: str, path: Path) -> None:
    """The metric over density, the front ringed: a panel a task, a line for each rule and gates."""
    points = [
        Point(row.task or "all runs", _line(row.run), row.density, row.value, row.dense, row.front)
        for row in rows
        if row.value is not None
    ]
    if not points:
        raise UserError(f"--plot: there is nothing to draw: no run has a number for {metric}")
    try:
        draw(points, metric, path)
    except OSError as error:
        raise UserError(f"--plot: {path} cannot be written: {error.strerror}") from error


def _line(run: StoredRun) -> str:
    """Runs of one line in a picture differ in their target alone, or in what is not shown."""
    gates = run.tags.get("leap.gates") or run.params.get("leap.gates", "")
    return ", ".join(text for text in (run.params.get("leap.rule", ""), gates) if text) or "pruned"


def _density(run: StoredRun) -> float | None:
    """What is left; older versions logged it with the steps alone, exact at the last of them."""
    exact = _number(run, DENSITY)
    return _number(run, "density") if exact is None else exact


def _number(run: StoredRun, metric: str) -> float | None:
    value = run.metrics.get(metric)
    return None if value is None or not math.isfinite(value) else value


def _first(texts: list[str]) -> list[str]:
    """The first of very many, and how many more there are."""
    more = [f"and {len(texts) - MOST_NAMED} more"] if len(texts) > MOST_NAMED else []
    return [*texts[:MOST_NAMED], *more]
