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

SEED = "train.seed"
Group = tuple[str, str]
"""A task, and the data that models are judged on."""


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
    task: str = ""
    data: str = ""

    @property
    def group(self) -> Group:
        """Only models of one task, judged on the same data, can be compared."""
        return self.task, self.data


@dataclass(frozen=True)
class Mean:
    """Finished trials with the same settings but for their seed; spread: the standard deviation over `num` of them."""

    settings: Settings
    density: float
    value: float
    spread: float
    dense: float | None
    num: int
    group: Group = ("", "")


def judged_on(config: JobConfig) -> Group:
    """The task of a job, and the data that its models are judged on where these are not the task's own."""
    data = config.data
    made = [f"seed {data.seed}"] if data.task.startswith("builtin/") else []
    return data.task, " ".join([*filter(None, (data.dataset, data.subset)), *(data.validation or ()), *made])


def metric_of(sweep: SweepConfig, jobs: Sequence[JobConfig]) -> str:
    """The metric that trials are compared by: the one asked for, or the main one of the first job.

    Raises UserError if a job does not report it, and if Optuna would compare what cannot be compared.
    """
    known: dict[str, list[str]] = {}
    for job in jobs:
        names = metric_names(job.data.task, job.data)
        known[job.data.task] = [name for name in known.get(job.data.task, names) if name in names]
    metric = sweep.metric or metric_names(jobs[0].data.task, jobs[0].data)[0]
    if any(metric not in names for names in known.values()):
        raise UserError(f"metric: got {show(sweep.metric)}; allowed: {_metrics_allowed(known)}")
    groups = [f"{task} ({data or 'its own data'})" for task, data in dict.fromkeys(map(judged_on, jobs))]
    if sweep.search == "optuna" and len(groups) > 1:
        raise UserError(
            f'search: got "optuna", which compares all trials, and they are judged on {", ".join(groups)}; allowed: '
            'one task and the same validation data in all of them, or "random"'
        )
    return metric


def _metrics_allowed(known: Mapping[str, Sequence[str]]) -> str:
    """known: by task what it reports."""
    if len(known) == 1:
        return "".join(f"what {task} reports, which is {', '.join(names)}, or null" for task, names in known.items())
    first, *others = known.values()
    common = [name for name in first if all(name in names for names in others)]
    each = "; ".join(f"{task} reports {', '.join(names)}" for task, names in known.items())
    return f"what all tasks of the sweep report, which is {', '.join(common)}; {each}"


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
    task, data = judged_on(trial.config)
    result = Result(trial.name, trial.settings, kind, trial.config.leap.target, task=task, data=data)
    if outcome is not None:
        per_rank = sweep.resources.gpus or sweep.resources.cpus
        cost = outcome.seconds * sweep.ranks * per_rank / 3600.0
        result = replace(result, seconds=outcome.seconds, cost=cost, error="" if kind == "done" else outcome.error)
    if kind != "done":
        return result
    files = read_files(path.parent)
    found, export = files.certificate, next(iter(exports(path.parent)), None)
    if error := lacking(found["metrics"]["pruned"], metric):
        return replace(result, outcome="failed", error=error)
    return replace(
        result,
        target=found["target"],  # the job of masks that are there says none
        density=found["density"],
        value=found["metrics"]["pruned"][metric],
        dense=found["metrics"].get("dense", {}).get(metric),
        weights=found["kept"],
        parameters=export.parameters if export else None,
        latency=export.latency if export else None,
        leap_ms=files.leap_ms,
        masks_sha256=found["masks_sha256"],
        weights_sha256=found["weights_sha256"],
    )


def lacking(metrics: Mapping[str, float], metric: str) -> str:
    """Why a trial with these metrics cannot be compared by `metric`, in words; "" where it can.

    Some metrics are of some rows alone, which only the data show: bits per byte of documents, not of conversations.
    """
    if metric in metrics:
        return ""
    return f"metric: got {show(metric)}, which its data do not give; allowed: {', '.join(metrics)}"


def _point(result: Result, metric: str) -> tuple[Group, float, float] | None:
    """(group, density, what is to be large)."""
    if result.density is None or result.value is None:
        return None
    return result.group, result.density, result.value if higher_is_better(metric) else -result.value


def means(results: Sequence[Result]) -> list[Mean]:
    """One for each combination of settings but the seed, of the trials that have a value."""
    alike: dict[str, list[tuple[float, float, float | None]]] = {}
    groups: dict[str, Group] = {}
    for result in results:
        if result.density is not None and result.value is not None:
            rest = {key: value for key, value in result.settings.items() if key != SEED}
            key = json.dumps(rest, sort_keys=True)
            alike.setdefault(key, []).append((result.density, result.value, result.dense))
            groups[key] = result.group
    found = []
    for key, those in alike.items():
        densities, values = [density for density, _, _ in those], [value for _, value, _ in those]
        dense = [value for _, _, value in those if value is not None]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        start = statistics.mean(dense) if dense else None
        density, value = statistics.mean(densities), statistics.mean(values)
        found.append(Mean(json.loads(key), density, value, spread, start, len(values), groups[key]))
    return found
