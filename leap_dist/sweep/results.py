"""What came of a sweep: a table with the Pareto front marked, a picture, and all of it as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from leap_dist.errors import UserError
from leap_dist.export.run_folder import CERTIFICATE
from leap_dist.section import show
from leap_dist.sweep.grid import Settings, short
from leap_dist.sweep.rank import Outcome
from leap_dist.sweep.sweep_file import TARGET, SweepConfig, Trial
from leap_dist.tasks import metric_names
from leap_dist.tracking.plots import COLOURS, plot_trade_off

RESULTS, PICTURES = "results.json", ("results.png", "results.svg")
TASK = "data.task"
LOWER_IS_BETTER = ("loss", "perplexity")
FRONT = "*"


@dataclass(frozen=True)
class Result:
    """One trial. What a trial that is not done does not have is None; `cost` is in hours of a GPU, or else of a CPU."""

    name: str
    settings: Settings
    outcome: str
    target: float
    density: float | None = None
    value: float | None = None
    dense: float | None = None
    weights: int | None = None
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


def higher_is_better(metric: str) -> bool:
    """False for a loss and a perplexity, of any split."""
    return not metric.endswith(LOWER_IS_BETTER)


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
    found = json.loads(path.read_text(encoding="utf-8"))
    return replace(
        result,
        density=found["density"],
        value=found["metrics"]["pruned"].get(metric),
        dense=found["metrics"].get("dense", {}).get(metric),
        weights=found["kept"],
        masks_sha256=found["masks_sha256"],
        weights_sha256=found["weights_sha256"],
    )


def _point(result: Result, metric: str) -> tuple[str, float, float] | None:
    """(task, density, what is to be large); only models of one task can be compared."""
    if result.density is None or result.value is None:
        return None
    task = str(result.settings.get(TASK, ""))
    return task, result.density, result.value if higher_is_better(metric) else -result.value


def pareto(points: Sequence[tuple[str, float, float] | None]) -> list[bool]:
    """Which points no other of their group beats: none is at most as dense and at least as good, and better in one."""
    given = [point for point in points if point is not None]

    def beaten(point: tuple[str, float, float]) -> bool:
        group, density, value = point
        rivals = [other for other in given if other[0] == group and other[1] <= density and other[2] >= value]
        return any(other[1] < density or other[2] > value for other in rivals)

    return [point is not None and not beaten(point) for point in points]


def rows(results: Sequence[Result], metric: str, gpus: int) -> list[dict[str, str | float]]:
    """The results as lines of a table."""
    hours = "GPU hours" if gpus else "CPU hours"
    return [
        {
            "front": FRONT if result.front else "",
            **{key.rpartition(".")[2]: short(value) for key, value in result.settings.items()},
            "density": _number(result.density),
            metric: _number(result.value),
            "Δ dense": _number(_difference(result)),
            "weights": _number(result.weights),
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
    """results.json and, if there is anything to draw, the pictures; the names of the files."""
    text = json.dumps({"metric": metric, "trials": [asdict(result) for result in results]}, indent=1)
    (folder / RESULTS).write_text(text + "\n", encoding="utf-8")
    if not any(result.front for result in results):
        return [RESULTS]
    panels, dense, fronts = _lines(results)
    for name in PICTURES:
        plot_trade_off(panels, dense, metric, folder / name, fronts)
    return [RESULTS, *PICTURES]


def _lines(
    results: Sequence[Result],
) -> tuple[dict[str, dict[str, list[tuple[float, float, float]]]], dict[str, float], dict[str, list[Any]]]:
    """(panels, dense, fronts) to draw: a panel a task, a line for each other setting; of many lines the front alone."""
    panels: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    dense: dict[str, float] = {}
    fronts: dict[str, list[Any]] = {}
    for result in results:
        if result.density is None or result.value is None:
            continue
        task = str(result.settings.get(TASK, "all trials"))
        line = ", ".join(str(short(v)) for key, v in result.settings.items() if key not in (TARGET, TASK)) or "pruned"
        panels.setdefault(task, {}).setdefault(line, []).append((result.density, result.value, 0.0))
        if result.dense is not None:
            dense.setdefault(task, result.dense)
        if result.front:
            fronts.setdefault(task, []).append((result.density, result.value))
    for task, lines in panels.items():
        if len(lines) > len(COLOURS):
            panels[task] = {"best of all trials": [(density, value, 0.0) for density, value in fronts[task]]}
    return panels, dense, fronts
