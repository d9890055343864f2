"""A sweep file: one job, what varies, and what a trial may take; and the trials that follow from it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from leap_dist.config.job_file import load_job, parse_section
from leap_dist.config.json_file import read_json
from leap_dist.config.section import Conflict, PositiveFloat, Section, as_objects, is_int, is_number, show
from leap_dist.config.sections import UNRELATED_TO_RESULT, JobConfig
from leap_dist.errors import UserError
from leap_dist.sweep.grid import MOST_CELLS, Settings, expand, names
from leap_dist.tracking.mlflow import parameters

TARGET = "leap.target"
MAX_VALUES = 10_000


def _as_values(value: Any) -> Any:
    """Lists as the tuples that a field stores; {"from": a, "to": b, "num": n} as n values at equal distances."""
    if not isinstance(value, dict):
        return value
    return {key: _spread(values) if isinstance(values, dict) else _tuple(values) for key, values in value.items()}


def _tuple(values: Any) -> Any:
    return tuple(values) if isinstance(values, list) else values


def _spread(given: Mapping[str, Any]) -> Any:
    """The values of a range; what is none stays as it is, and the field refuses it."""
    first, last, num = (given.get(key) for key in ("from", "to", "num"))
    if given.keys() != {"from", "to", "num"} or not (is_number(first) and is_number(last) and is_int(num)):
        return given
    assert first is not None and last is not None and num is not None  # numbers, as was just seen
    if not 2 <= num <= MAX_VALUES:
        return given
    return tuple(round(first + (last - first) * i / (num - 1), 12) for i in range(num))


class ResourcesConfig(Section):
    """What one rank takes."""

    cpus: PositiveFloat = Field(default=1.0, description="a number > 0")
    """CPUs, or a share of one; a rank runs as many threads, at least one."""
    gpus: int = Field(default=0, ge=0, description="an integer >= 0")
    """Whole GPUs; 0: the rank runs on CPUs."""


class BudgetConfig(Section):
    """Where a call ends; what runs then is run to its end, the rest is for the next call."""

    trials: int | None = Field(default=None, ge=1, description="an integer >= 1, or null")
    hours: PositiveFloat | None = Field(default=None, description="a number > 0, or null")
    gpu_hours: PositiveFloat | None = Field(default=None, description="a number > 0, or null")
    """Hours of trials that ended, times the GPUs of each."""


class SweepConfig(Section):
    """A sweep file."""

    config: str = Field(min_length=1, description="a job file, or the name of one in configs/")
    """What all trials share."""
    vary: Annotated[dict[str, tuple[Any, ...]], BeforeValidator(_as_values)] = Field(
        default={},
        description='an object of dotted keys, each with a list of values or {"from": a, "to": b, "num": n >= 2}',
    )
    """Every combination is a trial."""
    cases: Annotated[tuple[dict[str, Any], ...], BeforeValidator(as_objects)] = Field(
        default=(), description="a list of objects, each with dotted keys and one value for each"
    )
    """Keys that vary together; each case is combined with all of `vary`."""
    ranks: int = Field(default=1, ge=1, description="an integer >= 1")
    """Ranks of a trial."""
    resources: ResourcesConfig = Field(default=ResourcesConfig(), description="an object with cpus and gpus")
    at_once: int | None = Field(default=None, ge=1, description="an integer >= 1, or null")
    """Trials at a time; null: as many as the cluster has room for."""
    metric: str | None = Field(default=None, min_length=1, description="a metric of the task, or null for its main one")
    mode: Literal["grid", "ladder"] = Field(default="grid", description='"grid" or "ladder"')
    """"ladder": one run walks down the targets, and a short one branches off to settle at each."""
    early_stop: Literal["asha"] | None = Field(default=None, description='"asha" or null')
    """"asha": of the trials with one target only the better half enters the settle phase."""
    budget: BudgetConfig = Field(default=BudgetConfig(), description="an object with trials, hours or gpu_hours")

    @staticmethod
    def conflicts(raw: Mapping[str, Any]) -> list[Conflict]:
        found: list[Conflict] = []
        vary, cases = raw.get("vary") or {}, raw.get("cases") or ()
        if not vary and not cases:
            found.append(("vary", f"got {show(raw.get('vary'))} and no cases; give one of them"))
        if isinstance(vary, Mapping):
            empty = [key for key, values in vary.items() if values in ([], ())]
            found += [(f"vary.{key}", "got []; allowed: one or more values") for key in empty]
            given = [key for case in cases if isinstance(case, Mapping) for key in case if key in vary]
            found += [("cases", f"{key} stands in vary too; leave it in one of them") for key in dict.fromkeys(given)]
        if raw.get("mode") == "ladder" and raw.get("early_stop"):
            found.append(("early_stop", f"got {show(raw['early_stop'])}; a ladder needs every rung: set null"))
        return found


@dataclass(frozen=True)
class Trial:
    """One job of a sweep, run into a folder of its own. Paths are relative to the sweep's folder."""

    name: str
    settings: Settings
    config: JobConfig
    snapshots: dict[int, str] = field(default_factory=dict)
    """Step -> folder: what a ladder's walk leaves for its rungs."""
    branch: str | None = None
    """The snapshot that a rung resumes from; it can run as soon as that is there."""


def read_sweep(file: Path) -> SweepConfig:
    """A sweep file. Raises UserError with all that is wrong in it."""
    return parse_section(SweepConfig, str(file), read_json(file))


def combinations(sweep: SweepConfig) -> list[Settings]:
    """Every case with every combination of `vary`, in order. Raises UserError if one comes twice."""
    grid, cases = expand(sweep.vary), sweep.cases or ({},)
    if len(grid) * len(cases) > MOST_CELLS:
        raise UserError(f"cases: got {len(grid) * len(cases)} combinations with vary; allowed: at most {MOST_CELLS}")
    found = [{**case, **settings} for case in cases for settings in grid]
    seen = [json.dumps(settings, sort_keys=True) for settings in found]
    times = Counter(seen)
    twice = next((settings for text, settings in zip(seen, found, strict=True) if times[text] > 1), None)
    if twice is not None:
        raise UserError(f"vary: the same combination comes twice: {show(twice)}; leave one out")
    return found


def trials_of(sweep: SweepConfig) -> list[Trial]:
    """The trials of a grid, each a valid job. Raises UserError for the first that is none."""
    found = combinations(sweep)
    return [Trial(name, settings, job_of(sweep, settings)) for name, settings in zip(names(found), found, strict=True)]


def job_of(sweep: SweepConfig, settings: Settings) -> JobConfig:
    """The job of a combination."""
    try:
        return load_job(sweep.config, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    except UserError as error:
        raise UserError(f"{error}\n  in the trial {show(settings)}") from error


def identity(sweep: SweepConfig, trials: list[Trial]) -> dict[str, str]:
    """What makes a sweep this one, flat: its results are of other things where any of it is different."""
    own = {"mode": sweep.mode, "ranks": str(sweep.ranks), "early_stop": str(sweep.early_stop)}
    own |= parameters(sweep.resources.model_dump(), "resources.")
    jobs = {trial.name: _lasting(trial.config) for trial in trials}
    first = next(iter(jobs.values()))
    shared = {key: value for key, value in first.items() if all(job.get(key) == value for job in jobs.values())}
    for name, job in jobs.items():
        own |= {f"{name}: {key}": value for key, value in job.items() if key not in shared}
    return own | shared


def _lasting(config: JobConfig) -> dict[str, str]:
    job = parameters(config.resolved())
    return {key: value for key, value in job.items() if not key.startswith(UNRELATED_TO_RESULT)}
