"""A trial of a sweep as Ray Tune runs it: rank actors in the trial's placement group, that stay from trial to trial.

Tune hands the next trial to the same process (`reset_config`), so that ranks are started once and not for each trial.
They are started afresh where one has failed or was lost. A loss is an error to Tune, which starts the trial again; its
ranks resume from the last checkpoint in its folder.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.tune import PlacementGroupFactory, Trainable
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from leap_dist.errors import UserError
from leap_dist.sweep.rank import Outcome, Rank, State
from leap_dist.sweep.sweep_file import SweepConfig

OUTCOME, RUNG, SECONDS = "outcome", "rung", "seconds"
METRICS = "metrics"  # as JSON: a scheduler gets a result with nested values taken apart
POLL = 1.0  # seconds between two looks at a running trial
JOIN = 600.0  # seconds that ranks have to start: imports from a slow disk, and DeepSpeed's first compilation
GRACE = 15.0  # seconds in which the others tell what happened, after one rank is lost
THREADS = 3  # of a rank: one runs the trial, the others answer meanwhile


class Lost(Exception):
    """A rank or its node is gone; the trial can resume elsewhere."""


def place(sweep: SweepConfig) -> PlacementGroupFactory:
    """What a trial takes: a bundle for each rank, and next to nothing for the process that Tune talks to."""
    return PlacementGroupFactory([{"memory": 1.0}, *([_needs(sweep)] * sweep.ranks)], strategy="PACK")


def _needs(sweep: SweepConfig) -> dict[str, float]:
    """What a rank takes."""
    gpus = {"GPU": float(sweep.resources.gpus)} if sweep.resources.gpus else {}
    return {"CPU": sweep.resources.cpus} | gpus


class JobTrial(Trainable):
    """config: "name" and "work" of a trial, "sweep", and "folder", where the paths of job files start from."""

    def setup(self, config: dict[str, Any]) -> None:
        self._ranks: list[Any] = []
        self._calls: list[Any] = []  # `run` of every rank, as long as it has not ended
        self._waits = False  # the trial waits for a verdict

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._stop_early()
        return True

    def step(self) -> dict[str, Any]:
        """Until there is something to tell: how far the trial is, metrics that it waits with at a rung, or its end.

        Raises Lost where a rank is gone.
        """
        try:
            self._have_it_run()
            found = self._look()
        except RayTaskError as error:
            if not isinstance(error.cause, UserError):
                raise Lost(str(error.cause)) from error
            found = Outcome("failed", error=str(error.cause))
        except RayError as error:
            raise Lost(f"a rank or its node is gone ({type(error).__name__})") from error
        if isinstance(found, Outcome):
            self._calls = []
            if found.kind == "failed":  # its ranks may wait for each other
                self._release()
            return {"done": True, OUTCOME: asdict(found)}
        self._waits = found.metrics is not None
        at_rung = {RUNG: found.rung, METRICS: json.dumps(found.metrics), SECONDS: found.seconds} if self._waits else {}
        return {"step": found.step, "total": found.total, **at_rung}

    def cleanup(self) -> None:
        self._stop_early()
        self._release()

    def _have_it_run(self) -> None:
        """Start what has to be started; after a verdict Tune calls for a next step only where the trial continues."""
        if not self._ranks:
            self._start_ranks()
        if self._waits:
            self._ranks[0].decide.remote(True)
        elif not self._calls:
            self._calls = [rank.run.remote(self.config["work"]) for rank in self._ranks]
        self._waits = False

    def _start_ranks(self) -> None:
        """Start ranks, each in its bundle, that have joined each other."""
        sweep: SweepConfig = self.config["sweep"]
        need, group, made = _needs(sweep), get_current_placement_group(), ray.remote(Rank)
        for index in range(sweep.ranks):
            where = PlacementGroupSchedulingStrategy(group, 1 + index)  # type: ignore[arg-type]  # `place` asks for one
            options = {"num_cpus": need["CPU"], "num_gpus": need.get("GPU", 0.0), "scheduling_strategy": where}
            rank = made.options(**options, max_concurrency=THREADS)
            self._ranks.append(rank.remote(sweep.resources.cpus, sweep.resources.gpus))
        deadline = time.monotonic() + JOIN
        meeting = ray.get(self._ranks[0].open_store.remote(), timeout=JOIN)
        joins = [r.join.remote(self.config["folder"], i, sweep.ranks, *meeting) for i, r in enumerate(self._ranks)]
        while joins:  # the first error that comes up is raised, though other ranks still wait for that one
            done, joins = ray.wait(joins, timeout=POLL)
            ray.get(done)
            if time.monotonic() > deadline:
                raise GetTimeoutError("the ranks did not find each other in time")

    def _look(self) -> Outcome | State:
        """The trial's outcome, if all ranks have ended or one has failed; or else its state, POLL seconds later.

        Raises RayError where a rank is lost, unless another one has failed by itself.
        """
        lost: RayError | None = None
        deadline = 0.0
        while self._calls:
            done, self._calls = ray.wait(self._calls, timeout=POLL)
            for call in done:
                try:
                    outcome: Outcome = ray.get(call)
                    if outcome.kind == "failed":
                        return outcome
                except RayError as error:
                    lost, deadline = lost or error, deadline or time.monotonic() + GRACE
            if lost and time.monotonic() > deadline:
                break
            if not lost and not done:
                try:
                    state: State = ray.get(self._ranks[0].state.remote(), timeout=POLL)
                    return state
                except GetTimeoutError:  # busy
                    continue
        if lost:
            raise lost
        return outcome

    def _stop_early(self) -> None:
        """End a trial that waits for a verdict, and got none: Tune has stopped it."""
        if self._waits:
            self._ranks[0].decide.remote(False)
            try:
                ray.get(self._calls, timeout=JOIN)
            except RayError:
                self._release()
        elif self._calls:  # it was stopped while it ran
            self._release()
        self._calls, self._waits = [], False

    def _release(self) -> None:
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []
