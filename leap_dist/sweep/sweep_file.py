"""A sweep file: one job, what varies, and what a trial may take; and the trials that follow from it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from leap_dist.config.job_file import load_job, parse_section
from leap_dist.config.json_file import read_json
from leap_dist.config.section import Conflict, PositiveFloat, Section, as_objects, is_int, is_number, show
from leap_dist.config.sections import UNRELATED_TO_RESULT, JobConfig
from leap_dist.errors import UserError
from leap_dist.secrets import hide_in
from leap_dist.sweep.grid import MOST_CELLS, Settings, expand, names
from leap_dist.sweep.space import Space, corners, drawn, rounded
from leap_dist.tracking.mlflow import parameters

TARGET = "leap.target"
MAX_VALUES = 10_000
CONTENT = " (what its files hold)"
"""Ends the keys of `identity` that an older version did not write, and that a machine without the files cannot."""
TRIES = 100  # settings with a value, of which one has to be a valid job
VALUES = (
    'a list of values, {"from": a, "to": b, "num": n >= 2}, or, for a search, {"uniform": [a, b]}, '
    '{"loguniform": [a, b]} with 0 < a < b, or {"choice": [...]}'
)

SECRET = (
    "a secret, and they name trials and stand in their results; allowed: in the job file, or in the environment "
    "(MLFLOW_TRACKING_URI)"
)


def _as_values(value: Any) -> Any:
    """Lists as the tuples that a field stores; {"from": a, "to": b, "num": n} as n values at equal distances."""
    if not isinstance(value, dict):
        return value
    return {key: _spread(values) if isinstance(values, dict) else _tuple(values) for key, values in value.items()}


def _tuple(values: Any) -> Any:
    return tuple(values) if isinstance(values, list) else ()


def _spread(given: Mapping[str, Any]) -> Any:
    """The values of a range, or the space of a search; () for what is none, which `conflicts` refuses."""
    if wrong_values(given):
        return ()
    kind, values = next(iter(given.items()))
    if len(given) == 1:
        return Space(kind, tuple(values))  # type: ignore[arg-type]  # one of the three, as was just seen
    first, last, num = given["from"], given["to"], given["num"]
    values = [round(first + (last - first) * i / (num - 1), 12) for i in range(num)]
    whole = is_int(first) and is_int(last)  # for keys that take no fractions
    return tuple(int(value) if whole and value == int(value) else value for value in values)


def wrong_values(given: Any) -> str | None:
    """What is wrong with the values of a key in `vary`; None for a list, a range, or the space of a search."""
    if isinstance(given, list | tuple):
        return None if given else "allowed: one or more values"
    if isinstance(given, Space) or (isinstance(given, dict) and isinstance(given.get("values"), tuple)):
        return None  # a space, as such or as pydantic writes it; what a file says has lists
    if not isinstance(given, dict):
        return f"allowed: {VALUES}"
    if given.keys() == {"from", "to", "num"}:
        if not (is_number(given["from"]) and is_number(given["to"]) and is_int(given["num"])):
            return "from and to are numbers, num is an integer"
        return None if 2 <= given["num"] <= MAX_VALUES else f"allowed for num: an integer from 2 to {MAX_VALUES}"
    kind, values = next(iter(given.items())) if len(given) == 1 else ("", None)
    if kind not in ("choice", "uniform", "loguniform") or not isinstance(values, list):
        return f"allowed: {VALUES}"
    if kind == "choice":
        return None if values else "allowed: one or more values"
    if len(values) != 2 or not all(map(is_number, values)):
        return f"allowed: two numbers, {{{show(kind)}: [a, b]}}"
    if not values[0] < values[1]:
        return "the first number has to be less than the second"
    return "both numbers have to be > 0" if kind == "loguniform" and values[0] <= 0 else None


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
    """What all trials share: a path from where you are, or from the sweep file's folder."""
    vary: Annotated[dict[str, tuple[Any, ...] | Space], BeforeValidator(_as_values)] = Field(
        default={},
        description=f"an object of dotted keys, each with {VALUES}",
    )
    """Every combination is a trial; a search draws from them."""
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
    search: Literal["grid", "random", "optuna"] = Field(default="grid", description='"grid", "random" or "optuna"')
    """"grid": every combination; "random", "optuna": `samples` of them. Optuna learns from the trials that are done."""
    samples: int = Field(default=20, ge=1, le=MOST_CELLS, description=f"an integer from 1 to {MOST_CELLS}")
    """Trials of a search."""
    early_stop: Literal["asha", "median"] | None = Field(default=None, description='"asha", "median" or null')
    """Trials with one target are compared at four rungs of the prune and settle phases. "asha": the better half
    continues; "median": what is not worse than the median."""
    budget: BudgetConfig = Field(default=BudgetConfig(), description="an object with trials, hours or gpu_hours")

    @staticmethod
    def conflicts(raw: Mapping[str, Any]) -> list[Conflict]:
        found: list[Conflict] = []
        vary, cases = raw.get("vary") or {}, raw.get("cases") or ()
        if not vary and not cases:
            found.append(("vary", f"got {show(raw.get('vary'))} and no cases; give one of them"))
        if isinstance(vary, Mapping):
            wrong = {key: problem for key, values in vary.items() if (problem := wrong_values(values))}
            found += [(f"vary.{key}", f"got {show(vary[key])}; {problem}") for key, problem in wrong.items()]
            drawn = [key for key, values in vary.items() if isinstance(values, Mapping) and len(values) == 1]
            if raw.get("search", "grid") == "grid":
                found += [
                    (f"vary.{key}", f'got {show(vary[key])}; it needs search: "random" or "optuna"') for key in drawn
                ]
            elif raw.get("mode") == "ladder" or cases or not vary:
                found.append(
                    ("search", f"got {show(raw['search'])}; a search draws from vary, without cases or ladder")
                )
            given = [key for case in cases if isinstance(case, Mapping) for key in case if key in vary]
            found += [("cases", f"{key} stands in vary too; leave it in one of them") for key in dict.fromkeys(given)]
        keys = [*(vary if isinstance(vary, Mapping) else ()), *(k for c in cases if isinstance(c, Mapping) for k in c)]
        found += [
            ("vary", f"got the key {show(key)}; allowed: a dotted key of a job file, such as leap.target")
            for key in dict.fromkeys(keys)
            if not all(str(key).split(".")) or "=" in str(key)
        ]
        found += [
            ("vary", f"{show(inner)} is a part of {show(outer)}, which stands here too; leave one of them out")
            for outer in dict.fromkeys(keys)
            for inner in dict.fromkeys(keys)
            if str(inner).startswith(f"{outer}.")
        ]
        found += [
            ("vary", f"the values of {show(key)} hold {SECRET}")
            for key in dict.fromkeys(keys)
            if any(hide_in({key: value}) != {key: value} for value in _values_of(key, vary, cases))
        ]
        samples = SweepConfig.model_fields["samples"].default
        if raw.get("search", "grid") == "grid" and raw.get("samples", samples) != samples:
            found.append(("samples", f"got {show(raw['samples'])}; an option of a search: set search, or remove it"))
        if raw.get("mode") == "ladder" and raw.get("early_stop"):
            found.append(("early_stop", f"got {show(raw['early_stop'])}; a ladder needs every rung: set null"))
        return found


def _values_of(key: Any, vary: Any, cases: Any) -> list[Any]:
    """The values that a key has in vary and cases, whatever these are."""
    given = vary.get(key) if isinstance(vary, Mapping) else None
    listed = given.get("choice") if isinstance(given, Mapping) else given
    own = [case[key] for case in cases if isinstance(case, Mapping) and key in case]
    return [*(listed if isinstance(listed, list) else ()), *own]


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
    """A sweep file, whose job file may lie beside it. Raises UserError with all that is wrong in it."""
    sweep = parse_section(SweepConfig, str(file), read_json(file))
    beside = file.parent / sweep.config
    if beside.is_file() and not Path(sweep.config).is_file():
        return sweep.model_copy(update={"config": str(beside)})
    return sweep


def combinations(sweep: SweepConfig) -> list[Settings]:
    """Every case with every combination of `vary`, in order. Raises UserError if one comes twice."""
    vary = {key: values for key, values in sweep.vary.items() if not isinstance(values, Space)}
    grid, cases = expand(vary), sweep.cases or ({},)
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
    """The trials of a grid or of a random search, each a valid job; of a search by Optuna none, as it names them later.

    Raises UserError for the first of a grid that is no valid job. A search leaves those out, and is refused for a value
    that no valid job has.
    """
    if sweep.search != "grid":
        _check_fractions(sweep, valid_corners(sweep)[0])
        if sweep.search == "optuna":
            if find_spec("optuna") is None:
                raise UserError('search: Optuna is not installed; pip install -e ".[search]", or set "random"')
            return []
    found = combinations(sweep) if sweep.search == "grid" else _drawn_jobs(sweep)
    return [Trial(name, settings, job_of(sweep, settings)) for name, settings in zip(names(found), found, strict=True)]


def valid_corners(sweep: SweepConfig) -> list[Settings]:
    """Settings of a search that are valid jobs, and together have each bound and each choice.

    Raises UserError for a value that is in no valid job, whatever the other keys have.
    """
    tried = corners(sweep.vary)
    others = [*tried, *drawn(sweep.vary, TRIES)]
    found: list[Settings] = []
    for corner in tried:
        try:
            job_of(sweep, corner)
            found.append(corner)
        except UserError:
            for key, value in corner.items():
                known = [*found[::-1], *others]  # what was right for the value before is likely to be for this one
                valid = next((s for other in known if is_job(sweep, s := {**other, key: value})), None)
                if valid is None:
                    raise
                found.append(valid)
    return found


def _drawn_jobs(sweep: SweepConfig) -> list[Settings]:
    found = drawn(sweep.vary, sweep.samples, lambda settings: is_job(sweep, settings))
    if not found:
        raise UserError(
            f"vary: none of {100 * sweep.samples} settings drawn from it is a valid job; give the keys values that go "
            "together"
        )
    return found


def _check_fractions(sweep: SweepConfig, usual: Settings) -> None:
    """Raises UserError for a range of a key that takes integers alone. usual: settings that are a valid job."""
    for key, space in sweep.vary.items():
        if isinstance(space, Space) and space.kind != "choice":
            low, high = space.values
            try:
                job_of(sweep, usual | {key: rounded(low + 0.382 * (high - low), low, high)})
            except UserError as error:
                if "an integer" not in str(error):
                    continue  # of some valid jobs: it is left out, or refused by name, where it is drawn
                raise UserError(
                    f"vary.{key}: got {show({space.kind: list(space.values)})}; it takes integers: give a list of them"
                ) from error


def is_job(sweep: SweepConfig, settings: Settings) -> bool:
    """Whether a combination is a valid job."""
    try:
        job_of(sweep, settings)
    except UserError:
        return False
    return True


def job_of(sweep: SweepConfig, settings: Settings) -> JobConfig:
    """The job of a combination. Raises UserError for one that is no valid job."""
    try:
        return load_job(sweep.config, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    except UserError as error:
        if str(error).startswith("config: "):  # there is no such file, for any trial
            raise
        raise UserError(f"{error}\n  in the trial {show(settings)}, as the sweep file sets it") from error


def identity(sweep: SweepConfig, trials: list[Trial]) -> dict[str, str]:
    """What makes a sweep this one, flat: its results are of other things where any of it is different."""
    own = {"mode": sweep.mode, "ranks": str(sweep.ranks), "early_stop": str(sweep.early_stop)}
    if sweep.early_stop or not trials:  # what was decided, and what Optuna has learned, is of this metric
        own["metric"] = str(sweep.metric)
    own |= parameters(sweep.resources.model_dump(), "resources.")
    if not trials:  # Optuna names them
        own |= {"vary": json.dumps(sweep.model_dump(mode="json")["vary"]), "search": sweep.search}
        return own | _lasting(job_of(sweep, valid_corners(sweep)[0]))
    jobs = {trial.name: _lasting(trial.config) for trial in trials}
    first = next(iter(jobs.values()))
    shared = {key: value for key, value in first.items() if all(job.get(key) == value for job in jobs.values())}
    for name, job in jobs.items():
        own |= {f"{name}: {key}": value for key, value in job.items() if key not in shared}
    return own | shared


def _lasting(config: JobConfig) -> dict[str, str]:
    job = parameters(config.resolved())
    own = {key: value for key, value in job.items() if not key.startswith(UNRELATED_TO_RESULT)}
    return own | {f"{key}{CONTENT}": digest for key, digest in _contents(config).items()}


def _contents(config: JobConfig) -> dict[str, str]:
    """Digests of a job's data files, by key; none where a file is not seen here: the nodes may have them alone."""
    from leap_dist.tracking.datasets import file_digests  # torch comes with it, which Tune's processes do not need

    try:
        return file_digests(config.data)
    except UserError:
        return {}
