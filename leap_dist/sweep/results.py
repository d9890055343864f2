"""What came of a sweep: a table with the Pareto front marked, a picture, and all of it as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from leap_dist.config.section import show
from leap_dist.errors import UserError
from leap_dist.files import write_text
from leap_dist.run_folder import CERTIFICATE, REPORT, exports, read_files
from leap_dist.sweep.grid import Settings, short, varying
from leap_dist.sweep.rank import Outcome
from leap_dist.sweep.sweep_file import TARGET, SweepConfig, Trial
from leap_dist.tasks import metric_names
from leap_dist.tracking.pareto import Point, higher_is_better, pareto, picture_of
from leap_dist.tracking.plots import save_all
from leap_dist.tracking.report import Entry, write_page

RESULTS, PICTURE = "results.json", "results"
TASK = "data.task"
FRONT = "*"


@dataclass(frozen=True)
class Result:
    """One trial. What a trial that is not done does not have is None; `cost` is in hours of a GPU, or else of a CPU.

    parameters, latency (ms of a forward pass): of the fastest export in the trial's folder, if it was exported.
    """

    name: str
    settings: Settings
    outcome: str
    target: float
    density: float | None = None
    value: float | None = None
    dense: float | None = None
    weights: int | None = None
    parameters: float | None = None
    latency: float | None = None
    leap_ms: float | None = None
    seconds: float | None = None
    cost: float | None = None
    front: bool = False
    error: str = ""
    masks_sha256: str | None = None
    weights_sha256: str | None = None


def metric_of(sweep: SweepConfig, trials: Sequence[Trial]) -> str:
    """The metric that trials are compared by. Raises UserError if a job does not report the one that is asked for."""
    for trial in trials:
        known = metric_names(trial.config.data.task)
        if sweep.metric is not None and not any(sweep.metric == n or sweep.metric.endswith(f"_{n}") for n in known):
            raise UserError(
                f"metric: got {show(sweep.metric)}; allowed: what {trial.config.data.task} reports, which is "
                f"{', '.join(known)}, or null"
            )
    return sweep.metric or metric_names(trials[0].config.data.task)[0]


def collect(
    sweep: SweepConfig, trials: Sequence[Trial], ended: Mapping[str, Outcome], folder: Path, metric: str
) -> list[Result]:
    """All trials in their order, the front marked."""
    results = [_result(sweep, trial, ended.get(trial.name), folder, metric) for trial in trials]
    front = pareto([_point(result, metric) for result in results])
    return [replace(result, front=best) for result, best in zip(results, front, strict=True)]


def _result(sweep: SweepConfig, trial: Trial, outcome: Outcome | None, folder: Path, metric: str) -> Result:
    path = folder / trial.name / CERTIFICATE
    kind = "done" if path.is_file() else outcome.kind if outcome else "not run"
    result = Result(trial.name, trial.settings, kind, trial.config.leap.target)
    if outcome is not None:
        per_rank = sweep.resources.gpus or sweep.resources.cpus
        cost = outcome.seconds * sweep.ranks * per_rank / 3600.0
        result = replace(result, seconds=outcome.seconds, cost=cost, error="" if kind == "done" else outcome.error)
    if kind != "done":
        return result
    files = read_files(path.parent)
    found, export = files.certificate, next(iter(exports(path.parent)), None)
    return replace(
        result,
        density=found["density"],
        value=found["metrics"]["pruned"].get(metric),
        dense=found["metrics"].get("dense", {}).get(metric),
        weights=found["kept"],
        parameters=export.parameters if export else None,
        latency=export.latency if export else None,
        leap_ms=files.leap_ms,
        masks_sha256=found["masks_sha256"],
        weights_sha256=found["weights_sha256"],
    )


def _point(result: Result, metric: str) -> tuple[str, float, float] | None:
    """(task, density, what is to be large); only models of one task can be compared."""
    if result.density is None or result.value is None:
        return None
    task = str(result.settings.get(TASK, ""))
    return task, result.density, result.value if higher_is_better(metric) else -result.value


def table_lines(results: Sequence[Result], metric: str, gpus: int) -> list[dict[str, str | float]]:
    """The results as lines of a table; of the settings those that differ, and the target."""
    shown = varying([result.settings for result in results]) | {TARGET}
    hours = "GPU hours" if gpus else "CPU hours"
    columns = {"parameters": "parameters", "latency": "latency ms", "leap_ms": "LEAP ms"}
    exported = {field: title for field, title in columns.items() if any(getattr(r, field) is not None for r in results)}
    return [
        {
            "front": FRONT if result.front else "",
            **{key.rpartition(".")[2]: short(value) for key, value in result.settings.items() if key in shown},
            "density": _number(result.density),
            metric: _number(result.value),
            "Δ dense": _number(_difference(result)),
            "weights": _number(result.weights),
            **{title: _number(getattr(result, field)) for field, title in exported.items()},
            "seconds": _number(result.seconds),
            hours: _number(result.cost),
            "outcome": result.outcome,
        }
        for result in results
    ]


def _number(value: float | None) -> str | float:
    return "" if value is None else value


def _difference(result: Result) -> float | None:
    return None if result.value is None or result.dense is None else result.value - result.dense


def write(results: Sequence[Result], metric: str, folder: Path) -> list[str]:
    """results.json, the page and, if there is anything to draw, the pictures; the names of the files."""
    text = json.dumps({"metric": metric, "trials": [asdict(result) for result in results]}, indent=1)
    write_text(folder / RESULTS, text + "\n")
    points = _points(results)
    picture = picture_of(points, metric) if points else None
    entries = [_entry(result, folder / result.name) for result in results]
    write_page(entries, metric, f"Sweep {folder.resolve().name}", picture, folder / REPORT)
    drawn = save_all(picture, folder / PICTURE) if picture else []
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


def _points(results: Sequence[Result]) -> list[Point]:
    """What there is to draw: a panel a task, a line for each other setting that varies."""
    points, shown = [], varying([result.settings for result in results]) - {TARGET, TASK}
    for result in results:
        if result.density is None or result.value is None:
            continue
        task = str(result.settings.get(TASK, "all trials"))
        line = ", ".join(str(short(value)) for key, value in result.settings.items() if key in shown) or "pruned"
        points.append(Point(task, line, result.density, result.value, result.dense))
    return points
