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
    may_settle: Callable[[Mapping[str, float]], bool] | None = None
    """Asked on rank 0 where the settle phase begins, with the metrics of the model as it is pruned then."""
    num_checkpoints: int | None = None
    """Checkpoints in a run whose train.checkpoint_every is null."""
    snapshots: Mapping[int, Path] = field(default_factory=dict)
    """Steps after which a checkpoint is written that stays, each into a folder of its own."""
    asked: Callable[[], str | None] = lambda: None
    """Asked on every rank now and then: how a request to save and stop arrived; None if there is none."""


NOTHING = Watch()


class Stopped(Exception):
    """A run that does not enter the settle phase; `metrics` are those of its pruned model."""

    def __init__(self, metrics: Mapping[str, float]) -> None:
        super().__init__("stopped before the settle phase")
        self.metrics = dict(metrics)
