"""Finished runs side by side: rows of a table, the Pareto front, the smallest that is good enough, what differs."""

from __future__ import annotations

import csv
import json
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from leap_dist.console import fitting
from leap_dist.errors import UserError
from leap_dist.run_folder import exports
from leap_dist.tracking.mlflow import differing
from leap_dist.tracking.pareto import LOWER_IS_BETTER, higher_is_better, pareto, picture_of
from leap_dist.tracking.registering import Place, parse_place
from leap_dist.tracking.rows import (
    DENSE,
    DENSITY,
    PRUNED,
    TARGET,
    Row,
    entries,
    folder_of,
    number,
    points,
    records,
    table_lines,
)
from leap_dist.tracking.runs import StoredRun

NOT_SET = "(not set)"
PICTURES, HTML = (".png", ".svg"), ".html"
SPARE = ("seconds", "LEAP ms", "weights", "MB", "parameters", "target", "latency ms", "Δ dense", "id")
"""Columns that a narrow table does without, the first ones before others."""
MOST_NAMED = 5  # runs in one part of a message
BLANK = re.compile(r"^[\s\x00-\x1f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]+")  # what one does not see
FORMULA = ("=", "+", "-", "@", "|", "%", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # also in full width
OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True)
class Request:
    """What to make of the runs. best: a condition as `parse_condition` takes it; plot, report: files to write.

    register, move: as which model the best one is registered, and whether an alias may leave another version.
    """

    metric: str | None = None
    best: str | None = None
    pareto: bool = False
    masks: bool = False
    plot: Path | None = None
    report: Path | None = None
    register: str | None = None
    move: bool = False

    @property
    def place(self) -> Place | None:
        """Where to register the best run."""
        return None if self.register is None else parse_place(self.register)

    def __post_init__(self) -> None:
        """Raises UserError before anything is read."""
        if self.best is not None:
            parse_condition(self.best)
        place = self.place
        if place and self.best is None:
            raise UserError(
                '--register: needs --best, such as --best "accuracy>=0.9": the run that is to be registered'
            )
        if self.move and not (place and place.alias):
            raise UserError("--move: needs --register NAME@ALIAS")
        if self.plot is not None and self.plot.suffix not in PICTURES:
            raise UserError(f"--plot: got {self.plot}; allowed: a file that ends in {' or '.join(PICTURES)}")
        if self.report is not None and self.report.suffix != HTML:
            raise UserError(f"--report: got {self.report}; allowed: a file that ends in {HTML}")


@dataclass(frozen=True)
class Answer:
    """tables: what to show, by title. records: the first table for programs. notes: what to say besides.

    found: the run of smallest density that is good enough, if one was asked for.
    """

    tables: dict[str, list[dict[str, str | float]]]
    records: list[dict[str, Any]]
    notes: list[str]
    found: Row | None = None


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
        value = number(row.run, PRUNED + self.metric)
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
    """The table of the finished runs, and what else was asked for; picture and report have all, also with --best.

    all_named: each run was named, so that one without a result is an error. Raises UserError.
    """
    condition = parse_condition(request.best) if request.best else None
    done, left_out = finished(runs, all_named)
    reached = choose_metric(done, condition.metric) if condition else None
    metric = choose_metric(done, request.metric or reached)
    rows = rows_of(done, metric)
    found = best(rows, condition) if condition else None
    notes = [f"left out: {why}" for why in left_out]
    if request.plot is not None:
        plot(rows, metric, request.plot)
        notes.append(f"picture: {request.plot}")
    if request.report is not None:
        report(rows, metric, request.report, notes[: len(left_out)])
        notes.append(f"report: {request.report}")
    shown = [row for row in rows if row.front or not request.pareto]
    title = f"{metric}; * on the Pareto front"
    if condition:
        if found is None:
            return Answer({}, [], [*notes, nearest_miss(rows, condition)])
        shown, title = [found], f"the smallest density with {condition}"
    lines, alike, no_room = fitting(table_lines(shown, metric), SPARE)
    if alike:
        title += f"\nin all rows: {', '.join(f'{name} {value}' for name, value in alike.items())}"
    if no_room:
        title += f"\nno room for {', '.join(no_room)}: --csv and --json have them"
    tables = {title: lines}
    if request.masks:
        from leap_dist.tracking.overlap import overlaps  # torch, which tables do without

        tables["overlap of masks: weights that both keep / weights that either keeps"] = overlaps(
            [row.run for row in (rows if condition else shown)]
        )
    return Answer(tables, records(shown, metric), notes, found)


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
        return f"{run.label} is not a pruning job: it has no {TARGET}"
    if metrics_of(run) and _density(run) is not None:
        return ""
    running = run.status == "RUNNING"  # which a run that was killed says for good
    why = "it is running still, or was killed" if running else f"it did not finish, its status is {run.status}"
    return f"{run.label} has no density of a pruned model: {why}"


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
    """Finished runs by group and density, those marked that are on the front of their group."""
    rows = []
    for run in runs:
        density = _density(run)
        assert density is not None, run.label
        export = next(iter(exports(folder_of(run))), None)
        rows.append(Row(run, density, number(run, PRUNED + metric), number(run, DENSE + metric), export))
    sign = 1.0 if higher_is_better(metric) else -1.0
    front = pareto([None if row.value is None else (row.group, row.density, sign * row.value) for row in rows])
    marked = [replace(row, front=best) for row, best in zip(rows, front, strict=True)]
    return sorted(marked, key=lambda row: (row.group, row.density, -sign * (row.value or 0.0)))


def best(rows: Sequence[Row], condition: Condition) -> Row | None:
    """The row of smallest density that reaches the condition; the first of equals, None if no row does.

    Raises UserError where rows of several groups do: their metrics have nothing to do with each other.
    """
    good: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if condition.holds(row):
            good.setdefault(row.group, []).append(row)
    if len(good) > 1:
        names = [
            f"{' on '.join(filter(None, group)) or 'no task'}: {', '.join(_first([row.run.label for row in found]))}"
            for group, found in good.items()
        ]
        what = "tasks" if len({task for task, _ in good}) > 1 else "sets of validation data"
        problem = f'--best: got "{condition}"; runs of {len(good)} {what} satisfy it, and cannot be compared'
        raise UserError("\n  ".join([f"{problem}; choose runs of one with --runs, --tag or --experiment:", *names]))
    return min((row for found in good.values() for row in found), key=lambda row: row.density, default=None)


def nearest_miss(rows: Sequence[Row], condition: Condition) -> str:
    """What to say when no row reaches the condition."""
    name = PRUNED + condition.metric
    values = [(value, row) for row in rows if (value := number(row.run, name)) is not None]
    if not values:
        return f"no run has {condition}: none has a number there"
    choose = max if condition.sign.startswith(">") else min
    value, row = choose(values, key=lambda pair: pair[0])
    return f"no run has {condition}; the nearest is {value:.4g}, {row.run.label} at density {row.density:.4g}"


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
                writer = csv.writer(file)
                writer.writerows([_plain(value) for value in line] for line in _lines_of(lines))
    except OSError as error:
        raise UserError(f"--json, --csv: {error.filename} cannot be written: {error.strerror}") from error


def _lines_of(records: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The titles, which may be names of runs, and the cells."""
    titles = list(records[0]) if records else []
    return [titles, *([record.get(title, "") for title in titles] for record in records)]


def _plain(value: Any) -> Any:
    """A cell that a spreadsheet takes for text, also where a name begins as a formula does."""
    return f"'{value}" if isinstance(value, str) and BLANK.sub("", value).startswith(FORMULA) else value


def plot(rows: Sequence[Row], metric: str, path: Path) -> None:
    """The metric over density, the front ringed: a panel a task, a line for each rule and gates."""
    from leap_dist.tracking.plots import save

    found = points(rows)
    if not found:
        raise UserError(f"--plot: there is nothing to draw: no run has a number for {metric}")
    try:
        save(picture_of(found, metric), path)
    except OSError as error:
        raise UserError(f"--plot: {path} cannot be written: {error.strerror}") from error


def report(rows: Sequence[Row], metric: str, path: Path, notes: Sequence[str]) -> None:
    """The page of all rows, in their order; notes: what to say below it. Raises UserError if it cannot be written."""
    from leap_dist.tracking.report import write_page

    found = points(rows)
    picture = picture_of(found, metric) if found else None
    try:
        write_page(entries(rows), metric, f"Pruned models by {metric}", picture, path, notes)
    except OSError as error:
        raise UserError(f"--report: {path} cannot be written: {error.strerror}") from error


def _density(run: StoredRun) -> float | None:
    """What is left; older versions logged it with the steps alone, exact at the last of them."""
    exact = number(run, DENSITY)
    return number(run, "density") if exact is None else exact


def _first(texts: list[str]) -> list[str]:
    """The first of very many, and how many more there are."""
    more = [f"and {len(texts) - MOST_NAMED} more"] if len(texts) > MOST_NAMED else []
    return [*texts[:MOST_NAMED], *more]
