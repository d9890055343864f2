"""When a run saves and when it stops: by its steps, by the first rank's clock, and by signals that any rank may get."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from leap_dist.checkpoint.checkpoints import CheckpointError, Checkpoints
from leap_dist.config.sections import TrainConfig
from leap_dist.console import console
from leap_dist.errors import UserError
from leap_dist.train.signals import Interrupted
from leap_dist.train.watch import Watch
from leap_dist.zero.agreement import agreement
from leap_dist.zero.ranks import Ranks

MEETINGS = 0.5
"""Seconds between two meetings of the ranks: what they cost is not to be seen, and a signal is soon heeded."""
MANY = 1000  # steps between two meetings at most, and between two looks whether the ranks prune alike
WORTH = 60.0
"""Seconds of training after which it is saved once more at its end."""


class Meetings:
    """Where ranks agree on what one of them knows: that a signal came, and that the first one's clock says to save.

    After some steps, on every rank after the same ones, one all-reduce of three numbers; the third says after how many
    steps the next one is. One rank alone meets itself after every step, for nothing.
    """

    def __init__(self, ranks: Ranks, start: int, minutes: float | None) -> None:
        self._ranks, self._period = ranks, 60.0 * minutes if minutes else float("inf")
        self._last = self.next = start
        self._met = self._saved = time.monotonic()

    def meet(self, done: int, asked: bool) -> tuple[bool, bool]:
        """Whether any rank is asked to stop, and whether the clock says to save. Collective."""
        now = time.monotonic()
        due = self._ranks.first and self.unsaved >= self._period
        per_step = (now - self._met) / max(done - self._last, 1)
        pause = max(1, min(MANY, round(MEETINGS / per_step))) if self._ranks.first and done > self._last else 1
        stop, save, steps = self._ranks.largest(torch.tensor([int(asked), int(due), pause])).tolist()
        self._met, self._last, self.next = now, done, done + (steps if self._ranks.world_size > 1 else 1)
        return bool(stop), bool(save)

    @property
    def unsaved(self) -> float:
        """Seconds since the last save, or since the start; by this rank's clock."""
        return time.monotonic() - self._saved

    def saved(self) -> None:
        """The clock starts anew."""
        self._saved = time.monotonic()


class RunProgress(BaseModel):
    """What a checkpoint of a job holds beside the engine: optimizer steps, metrics by model, steps left out, and where
    a stream of examples was."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    step: int = Field(ge=0)
    measured: dict[str, dict[str, float]]
    left_out: int = Field(ge=0)
    run_id: str | None
    stream: dict[str, Any] | None = None


def read_progress(found: Mapping[str, Any], num_steps: int, dense_end: int, before: str = "dense") -> RunProgress:
    """The progress in a checkpoint of a run with `num_steps` steps, which has metrics of the model `before`.

    Raises UserError for what no run has written.
    """
    try:
        progress = RunProgress.model_validate(dict(found))
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    else:
        if progress.step == num_steps and (before in progress.measured or num_steps <= dense_end):
            return progress
        problem = f"it is of step {progress.step} and has metrics of {list(progress.measured)}"
    raise UserError(
        f"--resume: the progress in the checkpoint of step {num_steps} is not what the run wrote: {problem}; remove "
        "that checkpoint to resume from an older one, or start a new run"
    )


class Saver:
    """Saves and stops a run of `total` steps, where `watch` and the job's settings say so.

    `check` is called now and then on the first rank; a UserError of it is raised on every rank.
    """

    def __init__(
        self,
        engine: Any,
        ranks: Ranks,
        config: TrainConfig,
        watch: Watch,
        checkpoints: Checkpoints,
        start: int,
        total: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._check = check
        self._engine, self._ranks, self._watch, self._checkpoints = engine, ranks, watch, checkpoints
        self._total, self._every = total, config.checkpoint_every
        if self._every is None and watch.num_checkpoints is not None:
            self._every = -(-total // watch.num_checkpoints)
        self._saves = self._every is not None or config.checkpoint_minutes is not None
        self._meetings = Meetings(ranks, start, config.checkpoint_minutes)
        self._losses, self._num_losses = torch.zeros((), device=ranks.device), 0

    def after(self, done: int, loss: Tensor, progress: Mapping[str, Any]) -> bool:
        """Save, if that is due after `done` steps, and say so; `progress`: what a checkpoint holds beside the engine.

        Raises Interrupted on every rank if any was asked to stop, CheckpointError if that could not be saved.
        """
        self._losses, self._num_losses = self._losses + loss, self._num_losses + 1
        state = {**progress, "step": done}
        if done in self._watch.snapshots:
            snapshot = Checkpoints(self._watch.snapshots[done], self._ranks, keep=1)
            snapshot.save(self._engine, {**state, "run_id": None})  # what resumes from it is another MLflow run
            snapshot.wait()
        due = self._every is not None and done % self._every == 0
        if done >= self._meetings.next:
            stop, late = self._meetings.meet(done, self._watch.asked() is not None)
            due = due or late
            self._ranks.on_first(self._check)
            if stop:
                self._stop(state)
        if due and done < self._total:
            self._ranks.on_first(self._check)
            self._save(state)
            return True
        if done % MANY == 0:
            agreement(self._engine, self._ranks)
        return False

    def end(self, progress: Mapping[str, Any]) -> None:
        """After the last step, save what a kill in the evaluation and export that follow would cost; then wait."""
        if self._saves and self._ranks.on_first(lambda: self._meetings.unsaved >= WORTH):
            self._save({**progress, "step": self._total})
        self.wait()

    def wait(self) -> None:
        """Return when nothing is being written any more. Collective."""
        self._telling(self._checkpoints.wait)

    def _save(self, state: Mapping[str, Any]) -> None:
        """Begin to save; the score of a checkpoint is that of the settled model, by the losses since the last one."""
        self._meetings.saved()
        mean = self._ranks.mean(self._losses / max(self._num_losses, 1)).item()
        self._losses, self._num_losses = torch.zeros_like(self._losses), 0
        score = -mean if self._engine.leap.settled and math.isfinite(mean) else None
        self._telling(partial(self._checkpoints.save, self._engine, state, score))

    def _telling(self, action: Callable[[], None]) -> None:
        """A checkpoint that could not be written is reported, and the run continues; the next one is tried again."""
        try:
            action()
        except CheckpointError as error:
            if self._ranks.first:
                console().print(f"warning: {error}; the run continues", markup=False, soft_wrap=True)

    def _stop(self, state: Mapping[str, Any]) -> None:
        reasons = self._ranks.gather_objects(self._watch.asked())
        why = next(reason for reason in reasons if reason is not None)
        self._save(state)
        self._checkpoints.wait()
        raise Interrupted(why, state["step"], saved=True)
