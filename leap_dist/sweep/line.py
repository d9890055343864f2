"""The trials of a sweep in line: what has ended, what may run next, where a budget ends the call.

What is finished is known by the trials' own certificates; trials.jsonl says how each one ended, and rungs.jsonl what
early stopping decided on which metrics, so that a sweep that was cut off resumes with what is left, and decides as if
it had not been.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from leap_dist.config.json_file import loads, read_text
from leap_dist.errors import UserError
from leap_dist.files import Lines, warn_if_unwritten
from leap_dist.run_folder import CERTIFICATE, CHECKPOINTS, LONGEST, REFERENCE, read_files
from leap_dist.sweep.board import Board
from leap_dist.sweep.ladder import SNAPSHOTS, is_there
from leap_dist.sweep.optuna_study import OptunaStudy
from leap_dist.sweep.rank import Outcome, Work
from leap_dist.sweep.result import lacking
from leap_dist.sweep.storage import Storage
from leap_dist.sweep.sweep_file import SweepConfig, Trial, job_of
from leap_dist.tracking.pareto import higher_is_better

ENDED, JUDGED = "trials.jsonl", "rungs.jsonl"
REMOVE = "remove the line"


class Ended(TypedDict):
    """A line of trials.jsonl."""

    trial: str
    kind: Literal["done", "failed", "stopped"]
    seconds: float
    error: str
    metrics: dict[str, float]


class Judged(TypedDict):
    """A line of rungs.jsonl."""

    trial: str
    rung: int
    target: float
    metrics: dict[str, float]
    goes_on: bool


class Line:
    """trials: all that are known, which a search by Optuna adds to. ended: how those ended that did, by name.

    judged: the lines of rungs.jsonl. waiting: trials that can run in this call. board: shows it to the user.
    """

    def __init__(self, sweep: SweepConfig, trials: Sequence[Trial], storage: Storage, metric: str) -> None:
        """Raises UserError where a file of an earlier call is damaged."""
        self.sweep, self.trials, self.storage, self.metric = sweep, list(trials), storage, metric
        self.folder = storage.folder
        lines = _read_lines(self.folder / ENDED, Ended)
        self.ended = {line["trial"]: Outcome(**{k: v for k, v in line.items() if k != "trial"}) for line in lines}
        self.judged = _read_lines(self.folder / JUDGED, Judged)
        self.search: OptunaStudy | None = None
        self._exhausted = False  # Optuna finds nothing more
        if sweep.search == "optuna":
            self.search = OptunaStudy(sweep, self.folder, higher_is_better(metric))
            self.trials += [self._named(*asked) for asked in self.search.asked()]
            self._tell_optuna(self.trials)
        over = {name for name, outcome in self.ended.items() if outcome.kind == "stopped"}
        self.waiting = [trial for trial in self.trials if not self.is_done(trial.name) and trial.name not in over]
        self.board = Board(self.total, self.total - self.num_left)
        self._running: dict[str, Trial] = {}
        self._begun, self._gpu_hours, self._start = 0, 0.0, time.monotonic()
        self._files = {name: Lines(self.folder / name) for name in (ENDED, JUDGED)}
        self._said: set[str] = set()

    @property
    def total(self) -> int:
        """Trials of the whole sweep; those that Optuna has named stay, also where `samples` is lower now."""
        if not self.search or self._exhausted:
            return len(self.trials)
        return max(len(self.trials), int(min(self.sweep.samples, self.search.num_combinations)))

    @property
    def num_left(self) -> int:
        """Trials that have not ended, those among them that Optuna has still to name."""
        return len(self.waiting) + self.total - len(self.trials)

    @property
    def about(self) -> str:
        """How many trials there are, and why not as many as were asked for."""
        few = self.sweep.search != "grid" and self.total < self.sweep.samples
        asked = f", as no more combinations make a valid job (samples: {self.sweep.samples})" if few else ""
        return f"{self.total} trial{'s' * (self.total != 1)}{asked}, {self.num_left} to run"

    @property
    def may_come(self) -> bool:
        """Whether a trial may be able to run later in this call, though none is now."""
        return bool(self._running and self.waiting) and not self._is_used_up()

    @property
    def running(self) -> list[Trial]:
        """Trials that were taken and have not ended."""
        return list(self._running.values())

    def take(self, parent: str | None) -> Work | None:
        """The next trial that can run now, as ranks need it. parent: the MLflow run that its own is shown below."""
        if self._is_used_up():
            return None
        if self.search and not self.waiting and self.num_left:
            if (asked := self.search.ask(self._is_job)) is None:
                self._exhausted = True
                self.board.tell("the search ends here: Optuna finds no other settings that make a valid job")
                return None
            self.trials.append(self._named(*asked))
            self.waiting.append(self.trials[-1])
        ready = (trial for trial in self.waiting if trial.branch is None or is_there(self.folder / trial.branch))
        if (trial := next(ready, None)) is None:
            return None
        self.waiting.remove(trial)
        self._running[trial.name] = trial
        self._begun += 1
        snapshots = {step: self.folder / where for step, where in trial.snapshots.items()}
        branch = None if trial.branch is None else self.folder / trial.branch
        tracking = trial.config.tracking.model_copy(update={"run_name": trial.name, "parent_run": parent})
        config = trial.config.model_copy(update={"tracking": tracking})
        return Work(config, self.folder / trial.name, self.sweep.early_stop is not None, snapshots, branch)

    def end(self, name: str, outcome: Outcome) -> None:
        """Write down and show how a trial has ended, and copy it to where the results are to be."""
        if outcome.kind == "done" and not self.is_done(name):
            error = f"{self.folder / name} is not seen here: nodes have to share the output"
            outcome = replace(outcome, kind="failed", error=error)
        if outcome.kind == "done":
            with warn_if_unwritten(Path(name), self._say_once):
                self.storage.publish(name)
            if error := lacking(self._metrics(name), self.metric):
                outcome = replace(outcome, kind="failed", error=error)
        self.ended[name] = outcome
        self._gpu_hours += outcome.seconds * self.sweep.ranks * self.sweep.resources.gpus / 3600.0
        self._tell_optuna([self._running.pop(name)])
        self._write(ENDED, name, asdict(outcome))
        self.board.ended(name, outcome)

    def clear(self) -> None:
        """Remove what no later call needs; called once nothing runs any more."""
        left = [trial.name for trial in self.trials if not self.is_done(trial.name)]
        stopped = [name for name in left if name in self.ended and self.ended[name].kind == "stopped"]
        needless = [self.folder / name / CHECKPOINTS for name in stopped]  # they stay stopped
        if left == stopped and len(self.trials) == self.total:
            needless += [self.folder / SNAPSHOTS, self.folder / REFERENCE]
        for path in needless:
            shutil.rmtree(path, ignore_errors=True)

    def publish(self) -> None:
        """Copy what the place of the results lacks of finished trials: it was not reached, or a call was cut off."""
        with warn_if_unwritten(Path("the copy of finished trials"), self.board.tell):
            for name in self.storage.lacking(trial.name for trial in self.trials if self.is_done(trial.name)):
                self.storage.publish(name)

    def judge(self, name: str, verdict: Mapping[str, Any]) -> None:
        """Write down what early stopping has decided on a trial."""
        self._write(JUDGED, name, verdict)

    def flush(self) -> None:
        """Write what a full disk has not taken before."""
        for lines in self._files.values():
            with suppress(OSError):  # reported before
                lines.flush()

    def is_done(self, name: str) -> bool:
        """Whether a trial has a certificate."""
        return (self.folder / name / CERTIFICATE).is_file()

    def _is_used_up(self) -> bool:
        budget = self.sweep.budget
        hours = (time.monotonic() - self._start) / 3600.0
        used = (budget.trials, self._begun), (budget.hours, hours), (budget.gpu_hours, self._gpu_hours)
        return any(limit is not None and spent >= limit for limit, spent in used)

    def _is_job(self, settings: dict[str, Any]) -> bool:
        """Whether settings that Optuna names make a valid job; of those that do not it is shown what is wrong."""
        try:
            job_of(self.sweep, settings)
        except UserError as error:
            self._say_once(f"left out, as it is no valid job: {error}")
            return False
        return True

    def _named(self, name: str, settings: dict[str, Any]) -> Trial:
        return Trial(name, settings, job_of(self.sweep, settings))

    def _tell_optuna(self, trials: Sequence[Trial]) -> None:
        """What came of those that are done; of the others Optuna learns nothing."""
        for name in [trial.name for trial in trials if self.search and self.is_done(trial.name)]:
            assert self.search is not None  # or there is no name
            density = read_files(self.folder / name).certificate["density"]
            self.search.tell(name, self._metrics(name).get(self.metric), density)

    def _metrics(self, name: str) -> dict[str, float]:
        """Of a trial that is done, with its masks."""
        found: dict[str, float] = read_files(self.folder / name).certificate["metrics"]["pruned"]
        return found

    def _write(self, file: str, name: str, content: Mapping[str, Any]) -> None:
        with warn_if_unwritten(self.folder / file, self._say_once):  # it waits, and comes with the next one
            self._files[file].add(json.dumps({"trial": name, **content}))

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.board.tell(text)


def _read_lines(path: Path, kind: Any) -> list[Any]:
    """The lines that hold what `kind` does; one that a kill cut short is left out."""
    allowed, found = TypeAdapter(kind), []
    lines = read_text(path, REMOVE, LONGEST).split("\n") if path.is_file() else ()
    for number, line in enumerate(lines, start=1):
        try:
            content = loads(line, finite=False)
        except (ValueError, RecursionError):
            continue
        try:
            found.append(allowed.validate_python(content))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the line"
            raise UserError(f"{path}:{number}: damaged: {where}: {first['msg']}; {REMOVE}") from error
    return found
