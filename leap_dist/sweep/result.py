"""What came of each trial of a sweep, which are on the Pareto front, and the means over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from leap_dist.config.section import show
from leap_dist.config.sections import JobConfig
from leap_dist.errors import UserError
from leap_dist.run_folder import CERTIFICATE, exports, read_files
from leap_dist.sweep.grid import Settings
from leap_dist.sweep.rank import Outcome
from leap_dist.sweep.sweep_file import SweepConfig, Trial
from leap_dist.tasks import metric_names
from leap_dist.tracking.pareto import higher_is_better, pareto

TASK, SEED = "data.task", "train.seed"


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


@dataclass(frozen=True)
class Mean:
    """Finished trials with the same settings but for their seed; spread: the standard deviation over `num` of them."""

    settings: Settings
    density: float
    value: float
    spread: float
    dense: float | None
    num: int


def metric_of(sweep: SweepConfig, jobs: Sequence[JobConfig]) -> str:
    """The metric that trials are compared by. Raises UserError if a job does not report the one that is asked for."""
    for job in jobs:
        known = metric_names(job.data.task)
        if sweep.metric is not None and sweep.metric not in known:
            raise UserError(
                f"metric: got {show(sweep.metric)}; allowed: what {job.data.task} reports, which is "
                f"{', '.join(known)}, or null"
            )
    return sweep.metric or metric_names(jobs[0].data.task)[0]


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
        target=found["target"],  # the job of masks that are there says none
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


def means(results: Sequence[Result]) -> list[Mean]:
    """One for each combination of settings but the seed, of the trials that have a value."""
    groups: dict[str, list[tuple[float, float, float | None]]] = {}
    for result in results:
        if result.density is not None and result.value is not None:
            rest = {key: value for key, value in result.settings.items() if key != SEED}
            groups.setdefault(json.dumps(rest, sort_keys=True), []).append((result.density, result.value, result.dense))
    found = []
    for key, group in groups.items():
        densities, values = [density for density, _, _ in group], [value for _, value, _ in group]
        dense = [value for _, _, value in group if value is not None]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        start = statistics.mean(dense) if dense else None
        mean = Mean(json.loads(key), statistics.mean(densities), statistics.mean(values), spread, start, len(values))
        found.append(mean)
    return found
