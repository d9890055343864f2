"""A sweep on Ray: trials wait in line, slots take them, and what ends is written down before the next one begins.

A slot is a thread here and some rank processes on the cluster. What is finished is known by the trials' own
certificates; trials.jsonl says how each one ended, and rungs.jsonl what early stopping decided on which metrics, so
that a sweep that was cut off resumes with what is left, and decides as if it had not been.
Ray places and watches the ranks; Ray Tune and Train are not used: they would start new processes for every trial, and
say nothing that the run folders do not.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from threading import Condition, Thread
from typing import Any

from pydantic import TypeAdapter, ValidationError

from leap_dist.config.json_file import loads, read_text
from leap_dist.errors import UserError, own_words
from leap_dist.files import Lines, warn_if_unwritten
from leap_dist.run_folder import CERTIFICATE, LONGEST
from leap_dist.sweep.board import Board
from leap_dist.sweep.cluster import room
from leap_dist.sweep.early_stop import Halving
from leap_dist.sweep.ladder import SNAPSHOTS, is_there
from leap_dist.sweep.rank import Outcome, State, Work
from leap_dist.sweep.storage import Storage
from leap_dist.sweep.sweep_file import SweepConfig, Trial
from leap_dist.tracking.pareto import higher_is_better

ENDED, JUDGED = "trials.jsonl", "rungs.jsonl"
REMOVE = "remove the line"
NO_ROOM = 600.0  # seconds without room for one trial, after which the sweep ends
LOOK, LOOK_ROOM = 0.5, 10.0  # seconds between two looks at the slots, and at the cluster


class RaySweep:
    """Runs the trials that have not ended. `waiting`: those; `ended`: how those ended that did, by name."""

    def __init__(self, sweep: SweepConfig, trials: Sequence[Trial], storage: Storage, metric: str) -> None:
        self._sweep, self._trials, self._storage, self._metric = sweep, trials, storage, metric
        self.ended = _read_ended(storage.folder)
        over = {name for name, outcome in self.ended.items() if outcome.kind == "stopped"}
        self.waiting = [trial for trial in trials if not self._is_done(trial) and trial.name not in over]
        self._halving = Halving(higher_is_better(metric)) if sweep.early_stop else None
        self._judged = _read_lines(storage.folder / JUDGED, _Judged)
        self._lines = {name: Lines(storage.folder / name) for name in (ENDED, JUDGED)}
        for trial in trials if self._halving else ():
            self._note(trial)
        self._said: set[str] = set()
        self._running: dict[str, State] = {}
        self._turn = Condition()
        self._stop = False
        self._fault: BaseException | None = None
        self._begun, self._gpu_hours, self._start = 0, 0.0, time.monotonic()

    def run(self, places: int, parent: str | None) -> None:
        """Run until nothing is left or the budget is used up, `places` trials at a time if the sweep does not say.

        parent: the MLflow run that those of the trials are shown below.
        """
        if not self.waiting:
            return
        self._parent = parent
        num = min(self._sweep.at_once or places, len(self.waiting))
        with Board(len(self._trials), len(self._trials) - len(self.waiting)) as self._board:
            self._board.tell(f"{len(self._trials)} trials, {len(self.waiting)} to run, up to {num} at a time")
            threads = [Thread(target=self._serve, daemon=True) for _ in range(num)]
            for thread in threads:
                thread.start()
            try:
                self._watch(threads)
            finally:
                self._stop = True
                for thread in threads:
                    thread.join()
                for lines in self._lines.values():
                    with suppress(OSError):  # said before
                        lines.flush()
        if self._fault is not None:
            raise self._fault

    def _watch(self, threads: Sequence[Thread]) -> None:
        """Show how far the slots are, until they end or the cluster has no room for a trial any more."""
        had_room = looked = time.monotonic()
        while any(thread.is_alive() for thread in threads):
            time.sleep(LOOK)
            with self._turn:
                running = dict(self._running)
            self._board.show(running)
            if time.monotonic() - looked < LOOK_ROOM:
                continue
            looked = time.monotonic()
            if room(self._sweep.resources) >= self._sweep.ranks:
                had_room = looked
            elif looked - had_room > NO_ROOM:
                raise UserError("the cluster has no room for a trial any more; add nodes, and start the sweep again")
            else:
                self._board.tell("nodes are gone: waiting until the cluster has room for a trial again")

    # Of a slot's thread

    def _serve(self) -> None:
        """Take trials from the line until there is none left for this slot."""
        from leap_dist.sweep.slot import CallEnds, Slot  # and with it Ray, which a finished sweep does not need

        slot = Slot(self._sweep, Path.cwd(), lambda: self._stop)
        try:
            while (trial := self._take()) is not None:
                look, lost = partial(self._look, trial), partial(self._lost, trial)
                self._end(trial, slot.run(self._work(trial), look, lost))
        except CallEnds:
            pass  # by `run`, which ends all slots: the next call resumes their trials
        except BaseException as error:
            self._fault, self._stop = error, True
        finally:
            slot.release()

    def _take(self) -> Trial | None:
        """The next trial that can run now; waits where all that are left need a snapshot that may still come."""
        with self._turn:
            while not self._stop and self.waiting and not self._is_used_up():
                ready = next((trial for trial in self.waiting if self._is_ready(trial)), None)
                if ready is not None:
                    self.waiting.remove(ready)
                    self._running[ready.name] = State()
                    self._begun += 1
                    return ready
                if not self._running:
                    return None
                self._turn.wait(timeout=1.0)
        return None

    def _is_used_up(self) -> bool:
        budget = self._sweep.budget
        hours = (time.monotonic() - self._start) / 3600.0
        used = (budget.trials, self._begun), (budget.hours, hours), (budget.gpu_hours, self._gpu_hours)
        return any(limit is not None and spent >= limit for limit, spent in used)

    def _is_ready(self, trial: Trial) -> bool:
        return trial.branch is None or is_there(self._storage.folder / trial.branch)

    def _is_done(self, trial: Trial) -> bool:
        return (self._storage.folder / trial.name / CERTIFICATE).is_file()

    def _work(self, trial: Trial) -> Work:
        folder = self._storage.folder
        snapshots = {step: folder / place for step, place in trial.snapshots.items()}
        branch = None if trial.branch is None else folder / trial.branch
        update = {"run_name": trial.name, "parent_run": self._parent}
        config = trial.config.model_copy(update={"tracking": trial.config.tracking.model_copy(update=update)})
        return Work(config, folder / trial.name, self._halving is not None, snapshots, branch)

    def _look(self, trial: Trial, state: State) -> bool | None:
        """Keep a running trial's state; the verdict, if it waits for one."""
        with self._turn:
            self._running[trial.name] = state
            if state.metrics is None or self._halving is None:
                return None
            if (verdict := self._halving.verdict(trial.name)) is None:
                verdict = self._halving.judge(trial.name, trial.config.leap.target, state.metrics[self._metric])
                self._judged[trial.name] = {"metrics": state.metrics, "goes_on": verdict}
                self._write(JUDGED, trial, self._judged[trial.name])
        return verdict

    def _say(self, text: str) -> None:
        """A line on the board, once."""
        if text not in self._said:
            self._said.add(text)
            self._board.tell(text)

    def _lost(self, trial: Trial, error: str) -> None:
        self._board.tell(f"{trial.name}: {error}; it resumes from its last checkpoint")

    def _note(self, trial: Trial) -> None:
        """What an earlier call of the sweep has seen of a trial counts in this one's verdicts."""
        outcome = self.ended.get(trial.name)
        judged = self._judged.get(trial.name)
        if judged is None and outcome is not None and outcome.metrics:
            judged = {"metrics": outcome.metrics, "goes_on": outcome.kind != "stopped"}
        if self._halving is not None and judged is not None and self._metric in judged["metrics"]:
            value = float(judged["metrics"][self._metric])
            self._halving.note(trial.name, trial.config.leap.target, value, judged["goes_on"])

    def _end(self, trial: Trial, outcome: Outcome) -> None:
        """Write down how a trial ended, and let those start that wait for it."""
        if outcome.kind == "done" and not self._is_done(trial):
            where = self._storage.folder / trial.name
            outcome = replace(outcome, kind="failed", error=f"{where} is not seen here: nodes have to share the output")
        if outcome.kind == "done":
            with warn_if_unwritten(Path(trial.name), self._say):
                self._storage.publish(trial.name)
        if trial.name in self._judged:
            outcome = replace(outcome, metrics=self._judged[trial.name]["metrics"])
        with self._turn:
            self._running.pop(trial.name, None)
            self.ended[trial.name] = outcome
            self._gpu_hours += outcome.seconds * self._sweep.ranks * self._sweep.resources.gpus / 3600.0
            self._write(ENDED, trial, asdict(outcome))
            self._board.ended(trial.name, outcome)
            self._turn.notify_all()
        if all(map(self._is_done, self._trials)):
            shutil.rmtree(self._storage.folder / SNAPSHOTS, ignore_errors=True)

    def _write(self, name: str, trial: Trial, content: Mapping[str, Any]) -> None:
        """One line more about a trial."""
        with warn_if_unwritten(self._storage.folder / name, self._say):  # it waits, and comes with the next one
            self._lines[name].add(json.dumps({"trial": trial.name, **content}))


def _read_ended(folder: Path) -> dict[str, Outcome]:
    """The last outcome of each trial."""
    return {name: Outcome(**line) for name, line in _read_lines(folder / ENDED, Outcome).items()}


@dataclass
class _Judged:
    """A line of rungs.jsonl."""

    metrics: dict[str, float]
    goes_on: bool


def _read_lines(path: Path, kind: type[Outcome] | type[_Judged]) -> dict[str, dict[str, Any]]:
    """The last line of each trial, which holds what `kind` does; a line that a kill cut short is left out."""
    found: dict[str, dict[str, Any]] = {}
    allowed = TypeAdapter(kind)
    lines = read_text(path, REMOVE, LONGEST).split("\n") if path.is_file() else ()
    for number, line in enumerate(lines, start=1):
        try:
            content = loads(line, finite=False)
        except (ValueError, RecursionError):
            continue
        try:
            name = content.pop("trial")
            found[name] = asdict(allowed.validate_python(content))
        except (ValidationError, AttributeError, TypeError, LookupError) as error:
            raise UserError(f"{path}:{number}: damaged: {own_words(error)}; {REMOVE}") from error
    return found
