"""From a sweep file to its results: check everything, connect, run what is left, show what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from leap_dist.config.job_file import parse_section
from leap_dist.config.json_file import read_json
from leap_dist.console import console, summary_table
from leap_dist.errors import UserError
from leap_dist.files import is_free, warn_if_unwritten, write_text
from leap_dist.run_folder import JOURNAL
from leap_dist.sweep.alone import check_alone, run_alone
from leap_dist.sweep.cluster import check_room, connected, is_installed
from leap_dist.sweep.ladder import ladder_of
from leap_dist.sweep.line import Line
from leap_dist.sweep.optuna_study import STUDY
from leap_dist.sweep.result import Result, collect, means, metric_of
from leap_dist.sweep.results import RESULTS, mean_lines, print_table, write
from leap_dist.sweep.stop import closing_records, heed_signals
from leap_dist.sweep.storage import Storage
from leap_dist.sweep.sweep_file import CONTENT, BudgetConfig, identity, job_of, read_sweep, trials_of, valid_corners
from leap_dist.tracking.completion import complete_trial
from leap_dist.tracking.mlflow import Tracker, differing

SWEEP, LOCK = "sweep.json", ".lock"
OURS = (LOCK, JOURNAL, STUDY)  # what a call that was cut off early may leave
MOST_SHOWN = 6  # differences from another sweep


def run_sweep(file: Path, output: str | None, address: str | None, resume: bool, budget: str | None) -> list[Result]:
    """Run a sweep file, or what is left of it, into `output`; returns the trials' results.

    Raises UserError, before anything runs, for what the user has to mend.
    """
    sweep = read_sweep(file)
    if budget is not None:
        sweep = sweep.model_copy(update={"budget": parse_budget(budget)})
    if sweep.budget.gpu_hours and not sweep.resources.gpus:
        key, value = f"{'--' if budget else ''}budget.gpu_hours", sweep.budget.gpu_hours
        why = "resources.gpus is 0, so no trial takes any; allowed: hours, or trials on GPUs"
        raise UserError(f"{key}: got {value:g}; {why}")
    trials = ladder_of(sweep) if sweep.mode == "ladder" else trials_of(sweep)
    jobs = [trial.config for trial in trials] or [job_of(sweep, settings) for settings in valid_corners(sweep)]
    metric = metric_of(sweep, jobs)
    default = Path("outputs") / file.stem
    storage = Storage(output or str(default), default)
    now = identity(sweep, trials)
    saved = _check_folder(storage.folder, now, resume)
    with ExitStack() as stack:
        stack.enter_context(_only_one(storage.folder))
        if not saved:
            (storage.folder / STUDY).unlink(missing_ok=True)  # of a call that was refused or cut off: it ran nothing
        line = Line(sweep, trials, storage, metric)
        stack.enter_context(closing_records(line))
        run = _runner(line, address, stack)
        tracking = jobs[0].tracking.model_copy(update={"run_name": file.stem})
        described, parent = {"sweep": sweep.model_dump(mode="json")}, saved.get("parent_run")
        with Tracker(tracking, described, True, parent, folder=storage.folder) as tracker:
            saved |= {"identity": saved.get("identity", {}) | now, "parent_run": tracker.run_id}
            _save(storage.folder, saved)
            with line.board:
                for trial in line.trials:
                    complete_trial(line.folder / trial.name, trial.config.tracking.mlflow_uri, line.board.tell)
                run(line, tracker.run_id)
                line.publish()
            line.clear()
            line.flush()
            results = collect(sweep, line.trials, line.ended, storage.folder, metric)
            num_done = sum(result.outcome == "done" for result in results)
            tracker.log(0, {"trials": len(results), "done": num_done})
            for name in _show_results(results, metric, line, file.stem):
                tracker.artifact(storage.folder / name)
    return results


def _runner(line: Line, address: str | None, stack: ExitStack) -> Callable[[Line, str | None], None]:
    """What runs the trials that are left: Ray Tune, or this process where Ray is not installed.

    Raises UserError where that is not possible.
    """
    if not line.num_left:  # needs neither
        return lambda line, parent: None
    if not is_installed():
        check_alone(line.sweep, address)
        return run_alone
    stack.enter_context(connected(address))
    heed_signals()  # anew: an embedded Ray handles SIGTERM by itself, and ends this process with it
    places = check_room(line.sweep.ranks, line.sweep.resources)
    from leap_dist.sweep.tuning import run_on_ray

    return lambda line, parent: run_on_ray(line, places, parent)


def parse_budget(text: str) -> BudgetConfig:
    """--budget: "trials=10", "hours=2.5" or "gpu_hours=8"; several with commas. Raises UserError for anything else."""
    given: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        try:
            given[key.strip()] = json.loads(value)
        except ValueError:
            given[key.strip()] = value
    return parse_section(BudgetConfig, "--budget", given)


def _check_folder(folder: Path, now: dict[str, str], resume: bool) -> dict[str, Any]:
    """What an earlier call of the same sweep has saved. Raises UserError for a folder of something else."""
    path = folder / SWEEP
    if not path.is_file():
        if resume:
            raise UserError(f"--resume: there is no sweep in {folder}; start it without --resume")
        if folder.exists() and (not folder.is_dir() or any(item.name not in OURS for item in folder.iterdir())):
            raise UserError(f"--output: {folder} exists and holds no sweep; choose another folder")
        return {}
    saved = read_json(path, "restore it, or choose another folder")
    before = saved.get("identity")
    if not isinstance(before, dict) or not isinstance(saved.get("parent_run"), str | None):
        raise UserError(f"--output: {path}: damaged: it does not say which sweep it is of; choose another folder")
    changed = [
        f"{key} is {now.get(key, 'missing')} now, and was {before.get(key, 'missing')}"
        for key in differing(before, now)
        if not key.endswith(CONTENT) or (key in before and key in now)
    ]
    if changed:
        more = [f"and {len(changed) - MOST_SHOWN} more"] if len(changed) > MOST_SHOWN else []
        head = f"--output: {folder} holds another sweep's results; choose another folder, or undo what differs:"
        raise UserError("\n  ".join([head, *changed[:MOST_SHOWN], *more]))
    return saved


def _save(folder: Path, saved: Mapping[str, Any]) -> None:
    """Note which sweep the folder is of. Raises UserError where that cannot be written: nothing has run yet."""
    try:
        write_text(folder / SWEEP, json.dumps(saved, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--output: {folder / SWEEP} cannot be written: {error.strerror}; make room") from error


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Keep a second call of the same sweep out."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be written to: {error.strerror}; choose another folder") from error
    with file:
        if not is_free(file):
            raise UserError(f"--output: another process runs the sweep in {folder}; wait for it, or end it")
        try:
            yield
        finally:
            if not (folder / SWEEP).is_file():  # it was refused: nothing of it is left
                for name in (STUDY, LOCK):
                    (folder / name).unlink(missing_ok=True)
                with suppress(OSError):  # it was there before, or holds something
                    folder.rmdir()


def _show_results(results: Sequence[Result], metric: str, line: Line, title: str) -> list[str]:
    """The table at the end; the names of the files that hold the results."""
    found = means(results)
    sweep, storage, importance = line.sweep, line.storage, line.search.importance() if line.search else {}
    print_table(results, metric, sweep.resources.gpus, title)
    if any(mean.num > 1 for mean in found):
        summary_table(mean_lines(found, metric), title=f"{title}: mean and spread over seeds")
    for result in results:
        if result.outcome == "failed":
            console().print(f"{result.name} failed: {result.error}", markup=False, soft_wrap=True)
    names: list[str] = []
    with warn_if_unwritten(storage.folder / RESULTS, lambda text: console().print(text, markup=False, soft_wrap=True)):
        names = write(results, metric, storage.folder, sweep.search != "grid", importance)
        for name in names:
            storage.publish(name)
    console().print(f"results: {storage.folder / RESULTS}", markup=False, soft_wrap=True)
    return names
