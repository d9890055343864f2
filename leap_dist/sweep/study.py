"""A study: one job with some keys varied, each cell a normal run; one table, one picture, mean and spread over seeds.

Cells that are done are not run again; one that was stopped resumes from its last checkpoint, if it wrote any.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from leap_dist.config.job_file import load_job, parse_section
from leap_dist.config.json_file import read_json
from leap_dist.config.section import Section
from leap_dist.errors import UserError
from leap_dist.files import warn_if_unwritten, write_text
from leap_dist.run_folder import CERTIFICATE, REPORT, read_files
from leap_dist.sweep.grid import Settings, expand, names, short, varying
from leap_dist.tracking.pareto import Point, higher_is_better, pareto, picture_of
from leap_dist.tracking.plots import save_all
from leap_dist.tracking.report import Entry, write_page

SEED, TARGET, TASK = "train.seed", "leap.target", "data.task"
PANELS = (TASK, "leap.gates")  # keys that part the picture into panels
RESULT = "study.json"


def _as_values(value: Any) -> Any:
    """JSON lists as the tuples that a field stores."""
    if not isinstance(value, dict):
        return value
    return {key: tuple(values) if isinstance(values, list) else values for key, values in value.items()}


class StudyConfig(Section):
    """A study file."""

    config: str = Field(min_length=1, description="a job file, or the name of one in configs/")
    """What all cells share."""
    vary: Annotated[dict[str, tuple[Any, ...]], BeforeValidator(_as_values)] = Field(
        min_length=1,
        description='an object of dotted keys, each with a list of values, such as "leap.target": [0.5, 0.1]',
    )
    """Every combination is a cell; "train.seed" gives means and spreads."""
    metric: str | None = Field(default=None, description="a metric of the task, or null for its main one")


@dataclass(frozen=True)
class Cell:
    """One run: its settings, and what its certificate says. `keep_ratios`: density of every gated tensor."""

    settings: Settings
    folder: str
    density: float
    metrics: dict[str, dict[str, float | None]]
    keep_ratios: dict[str, float]


def read_study(file: Path) -> StudyConfig:
    """A study file whose cells all are valid jobs. Raises UserError with what is wrong."""
    study = parse_section(StudyConfig, str(file), read_json(file))
    empty = [key for key, values in study.vary.items() if not values]
    if empty:
        raise UserError(f"{file}: vary.{empty[0]}: got []; allowed: one or more values")
    for settings in expand(study.vary):
        load_job(study.config, overrides(settings))
    return study


def overrides(settings: Settings) -> list[str]:
    """As `--set` takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def run_study(study: StudyConfig, output: Path, script: Path, workers: int, say: Callable[[str], None]) -> list[Cell]:
    """Run what is missing, `workers` cells at a time; `script` is launch/prune.py. The cells that came out, in order.

    A cell that fails is reported, and does not stop the others; the next call tries it again. Raises UserError for a
    folder that cannot be made, and for a finished run of another job in the folder of a cell.
    """
    grid = expand(study.vary)
    cells = dict(zip(names(grid), grid, strict=True))
    waiting = [name for name in cells if not (output / name / CERTIFICATE).is_file()]
    for name in cells.keys() - set(waiting):
        _check_finished(study, cells[name], output / name)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {output} cannot be made: {error.strerror}; choose another folder") from error
    say(f"{len(cells)} cells, {len(cells) - len(waiting)} done before, {workers} at a time")
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(_run_cell, study, cells[name], output / name, script, workers): name for name in waiting}
        for number, future in enumerate(as_completed(futures), start=1):
            name = futures[future]
            try:
                code = future.result()
                how = f"failed with exit code {code}: {_last_words(output / f'{name}.log')}" if code else "done"
            except OSError as error:  # of its log
                how = f"failed: {error}"
            say(f"{number}/{len(waiting)} {name}: {how}")
    found = [cell for name, settings in cells.items() if (cell := _read_cell(output / name, settings)) is not None]
    with warn_if_unwritten(output / RESULT, say):
        write_text(output / RESULT, json.dumps([asdict(cell) for cell in found], indent=1) + "\n")
    return found


def _check_finished(study: StudyConfig, settings: Settings, folder: Path) -> None:
    """Raises UserError if the finished run in a cell's folder is of another job: it must not stand for the cell."""
    from leap_dist.train.output import check_same_job  # torch, which a study of new cells does without

    check_same_job("--output", folder, load_job(study.config, overrides(settings)), world_size=1)


def _run_cell(study: StudyConfig, settings: Settings, folder: Path, script: Path, workers: int) -> int:
    """One cell as a process of its own, which resumes what an earlier one has left; its output goes to a log beside
    the folder. The exit code."""
    command = [sys.executable, str(script), "--config", study.config, "--output", str(folder)]
    command += [part for text in overrides(settings) for part in ("--set", text)]
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    with folder.with_name(f"{folder.name}.log").open("w", encoding="utf-8") as log:
        return subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode


def _read_cell(folder: Path, settings: Settings) -> Cell | None:
    path = folder / CERTIFICATE
    if not path.is_file():
        return None
    found = read_files(folder).certificate
    ratios = {name: tensor["density"] for name, tensor in found["tensors"].items() if tensor["counted"]}
    return Cell(settings, folder.name, found["density"], found["metrics"], ratios)


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


# ---------------------------------------------------------------------------------------------- what came of it


@dataclass(frozen=True)
class Mean:
    """Cells that differ in their seed alone: the mean of a metric, and its standard deviation over `num` seeds."""

    settings: Settings
    density: float
    dense: float
    mean: float
    spread: float
    num: int
    keep_ratio_min: float
    keep_ratio_max: float


def summarize(cells: Sequence[Cell], metric: str | None = None) -> list[Mean]:
    """One mean for each combination of settings but the seed; `metric`: the first of the task if None."""
    means = []
    for settings, group in _by_settings(cells):
        name = metric or next(iter(group[0].metrics["pruned"]))
        values = [_value(cell, "pruned", name) for cell in group]
        ratios = [ratio for cell in group for ratio in cell.keep_ratios.values()]
        means.append(
            Mean(
                settings,
                statistics.mean(cell.density for cell in group),
                statistics.mean(_value(cell, "dense", name) for cell in group),
                statistics.mean(values),
                statistics.stdev(values) if len(values) > 1 else 0.0,
                len(values),
                min(ratios),
                max(ratios),
            )
        )
    return means


def _by_settings(cells: Sequence[Cell]) -> Iterator[tuple[Settings, list[Cell]]]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        rest = {key: value for key, value in cell.settings.items() if key != SEED}
        groups.setdefault(json.dumps(rest), []).append(cell)
    for key, group in groups.items():
        yield json.loads(key), group


def _value(cell: Cell, model: str, metric: str) -> float:
    metrics: Mapping[str, float | None] = cell.metrics[model]
    value = metrics.get(metric)
    if value is None:
        raise UserError(f'metric: got "{metric}"; {cell.folder} has {", ".join(metrics)}; choose one of them')
    return value


def table_lines(means: Sequence[Mean]) -> list[dict[str, str | float]]:
    """The means as lines of a table, with the settings in which they differ."""
    differing = varying([mean.settings for mean in means])
    return [
        {
            **{key.rpartition(".")[2]: short(value) for key, value in mean.settings.items() if key in differing},
            "density": mean.density,
            "mean": mean.mean,
            "spread": mean.spread,
            "seeds": mean.num,
            "dense": mean.dense,
            "keep ratios": f"{mean.keep_ratio_min:.3f} to {mean.keep_ratio_max:.3f}",
        }
        for mean in means
    ]


def write_pictures(cells: Sequence[Cell], means: Sequence[Mean], metric: str | None, output: Path) -> list[Path]:
    """study.png and study.svg, that also dark, and report.html, the page of all cells; the files."""
    name = metric or next(iter(cells[0].metrics["pruned"]))
    lines = varying([mean.settings for mean in means]) - {TARGET, *PANELS}
    picture = picture_of([_point(mean, lines) for mean in means], name)
    values = [_value(cell, "pruned", name) for cell in cells]
    sign = 1.0 if higher_is_better(name) else -1.0
    panels = [_panel(cell.settings) for cell in cells]
    front = pareto([(p, c.density, sign * v) for p, c, v in zip(panels, cells, values, strict=True)])
    entries = [_entry(cell, name, best, output) for cell, best in zip(cells, front, strict=True)]
    write_page(entries, name, f"Study {output.resolve().name}", picture, output / REPORT)
    return [*save_all(picture, output / "study"), output / REPORT]


def _panel(settings: Settings) -> str:
    """Cells of one task and one kind of gates share a panel, and are measured against each other."""
    return _words(settings, PANELS) or "all"


def _point(mean: Mean, lines: Collection[str]) -> Point:
    """A point of the picture, with a line for each combination of the settings `lines`."""
    line = _words(mean.settings, lines) or "pruned"
    return Point(_panel(mean.settings), line, mean.density, mean.mean, mean.dense, mean.spread)


def _words(settings: Settings, keys: Collection[str]) -> str:
    return ", ".join(str(short(value)) for key, value in settings.items() if key in keys)


def _entry(cell: Cell, metric: str, front: bool, output: Path) -> Entry:
    files = read_files(output / cell.folder)
    return Entry(
        cell.folder,
        "done",
        {key.rpartition(".")[2]: str(short(value)) for key, value in cell.settings.items() if key != TARGET},
        files.certificate["target"],
        cell.density,
        _value(cell, "pruned", metric),
        _value(cell, "dense", metric),
        files.certificate["kept"],
        files.leap_ms,
        front=front,
        folder=output / cell.folder,
    )
