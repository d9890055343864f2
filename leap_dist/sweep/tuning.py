"""A sweep on Ray Tune, which places trials, starts them again after a loss, and stops those that are behind."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Callback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from leap_dist.errors import UserError
from leap_dist.sweep.cluster import room
from leap_dist.sweep.early_stop import Judge
from leap_dist.sweep.line import Line
from leap_dist.sweep.rank import Outcome, State
from leap_dist.sweep.stop import heed_signals
from leap_dist.sweep.trainable import METRICS, OUTCOME, SECONDS, JobTrial, place
from leap_dist.tracking.store import environment

RETRIES = 3  # times that a trial is started again after a rank or a node was lost
NO_ROOM = 600.0  # seconds without room for one trial, after which the sweep ends
LOOK, LOOK_ROOM = 0.5, 10.0  # seconds between two looks at the trials, and at the cluster
SCRATCH = ".tune"  # Tune's own files, in the sweep's folder; nothing is read from them
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep as it ends any command of ours
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def run_on_ray(line: Line, places: int, parent: str | None) -> None:
    """Run until nothing is left or the budget is used up, `places` trials at a time if the sweep does not say.

    parent: the MLflow run that those of the trials are shown below.
    """
    at_once = min(line.sweep.at_once or places, line.num_left)
    line.board.tell(f"{line.about}, up to {at_once} at a time")
    with environment(QUIET):
        for logger in map(logging.getLogger, ("ray.tune", "ray.train", "ray.air")):
            logger.setLevel(logging.CRITICAL)  # what matters of it we say ourselves
        try:
            tune.run(
                JobTrial,
                search_alg=Next(line, parent),
                scheduler=Judge(line) if line.sweep.early_stop else FIFOScheduler(),
                callbacks=[Events(line)],
                num_samples=line.num_left,
                max_concurrent_trials=at_once,
                resources_per_trial=place(line.sweep),
                reuse_actors=True,
                max_failures=RETRIES,
                raise_on_failed_trial=False,
                storage_path=str(line.folder),
                name=SCRATCH,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
                verbose=0,
                _remote=False,  # also by ray://, so that what is said is said here
            )
        finally:
            shutil.rmtree(line.folder / SCRATCH, ignore_errors=True)


class Next(Searcher):
    """Tune asks it for the next trial. It keeps nothing: the sweep's folder says what is left."""

    def __init__(self, line: Line, parent: str | None) -> None:
        super().__init__()
        self._line, self._parent = line, parent

    def suggest(self, trial_id: str) -> Any:
        work = self._line.take(self._parent)
        if work is None:
            return None if self._line.may_come else Searcher.FINISHED
        return {"name": work.output.name, "work": work, "sweep": self._line.sweep, "folder": Path.cwd()}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None: ...

    def save(self, checkpoint_path: str) -> None: ...

    def restore(self, checkpoint_path: str) -> None: ...


class Events(Callback):
    """Tune calls it when something happens to a trial."""

    def __init__(self, line: Line) -> None:
        self._line, self._board = line, line.board
        self._states: dict[str, State] = {}
        self._began: dict[str, float] = {}
        self._lost: Counter[str] = Counter()  # seconds of tries that came to nothing
        self._had_room = self._looked = self._shown = time.monotonic()

    def setup(self, *args: Any, **info: Any) -> None:
        heed_signals()  # anew: Tune would end the sweep on SIGUSR1 as if all of it had run

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._began[trial.config["name"]] = time.monotonic()
        self._states[trial.config["name"]] = State()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        self._states[trial.config["name"]] = State(result.get("step", 0), result.get("total", 0))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["name"]
        self._lost[name] += self._seconds(name)  # type: ignore[assignment]  # a Counter counts seconds as well
        self._board.tell(f"{name}: {_why(trial)}; it resumes from its last checkpoint")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        found = trial.last_result
        if OUTCOME in found:
            self._end(trial, Outcome(**found[OUTCOME]))
        else:  # Tune has stopped it
            self._end(trial, Outcome("stopped", found[SECONDS], metrics=json.loads(found[METRICS])))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = f"given up after {RETRIES + 1} tries: {_why(trial)}"
        self._end(trial, Outcome("failed", self._seconds(trial.config["name"]), error))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Show how far the trials are; raises UserError once the cluster has had no room for one for long."""
        now = time.monotonic()
        if now - self._shown >= LOOK:
            self._shown = now
            self._board.show(self._states)
        if now - self._looked < LOOK_ROOM:
            return
        self._looked = now
        if room(self._line.sweep.resources) >= self._line.sweep.ranks:
            self._had_room = now
        elif now - self._had_room > NO_ROOM:
            raise UserError("the cluster has no room for a trial any more; add nodes, and start the sweep again")
        else:
            self._board.tell("nodes are gone: waiting until the cluster has room for a trial again")

    def _seconds(self, name: str) -> float:
        """Of the try that runs."""
        return time.monotonic() - self._began.get(name, time.monotonic())

    def _end(self, trial: Any, outcome: Outcome) -> None:
        name = trial.config["name"]
        self._states.pop(name, None)
        self._line.end(name, replace(outcome, seconds=outcome.seconds + self._lost[name]))


def _why(trial: Any) -> str:
    """Why the last try of a trial came to nothing: the last line of what was raised."""
    text = Path(trial.error_file).read_text("utf-8", "replace") if trial.error_file else ""
    return (text.strip().splitlines() or ["its process is gone"])[-1].rpartition("Lost: ")[2].strip()
