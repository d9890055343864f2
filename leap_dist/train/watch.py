"""What a run reports while it is running, and what it is asked for beside its job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Watch:
    """By default nothing is reported and nothing is asked for."""

    notify: Callable[[int, int, Mapping[str, float]], None] | None = None
    """Called on every rank with the step, the number of steps and the measures, as often as measures are logged."""
    may_go_on: Callable[[int, Mapping[str, float]], bool] | None = None
    """Asked on rank 0 at the steps of `rungs`, with the rung and the metrics of the model as it is pruned then."""
    num_checkpoints: int | None = None
    """Checkpoints in a run whose train.checkpoint_every is null."""
    snapshots: Mapping[int, Path] = field(default_factory=dict)
    """Steps after which a checkpoint is written that stays, each into a folder of its own."""
    references: Path | None = None
    """A folder in which runs that differ only in how they prune share their dense reference; None: in the run's own."""
    asked: Callable[[], str | None] = lambda: None
    """Asked on every rank now and then: how a request to save and stop arrived; None if there is none."""


NOTHING = Watch()


def rungs(dense_end: int, settle_start: int, total: int) -> dict[int, int]:
    """Steps before which runs are compared: a third and two thirds of the way down, and at and amid the settle phase.

    Their numbers double, as those of successive halving do.
    """
    down, settle = settle_start - dense_end, total - settle_start
    steps = (dense_end + down // 3, dense_end + 2 * down // 3, settle_start, settle_start + settle // 2)
    return {step: 2**index for index, step in enumerate(steps) if dense_end < step < total}


class Stopped(Exception):
    """A run that is stopped at a rung; `metrics` are those of its model there."""

    def __init__(self, metrics: Mapping[str, float]) -> None:
        super().__init__("stopped at a rung")
        self.metrics = dict(metrics)
