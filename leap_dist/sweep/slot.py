"""A slot: a place on the cluster for one trial at a time, with ranks that stay from trial to trial.

The ranks are actors in a placement group, packed on a node where they fit and spread over nodes where not. They are
let go, and started afresh for the next trial, where one has failed or was lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from leap_dist.sweep.rank import Outcome, Rank, State, Work
from leap_dist.sweep.sweep_file import SweepConfig

POLL = 1.0  # seconds between two looks at a running trial
JOIN = 600.0  # seconds that ranks have to start: imports from a slow disk, and DeepSpeed's first compilation
GRACE = 15.0  # seconds in which the others tell what happened, after one rank has ended with an error
THREADS = 3  # of a rank: one runs the trial, the others answer meanwhile
RETRIES = 3  # times that a trial is taken up again after a rank or a node was lost


class CallEnds(Exception):
    """The sweep ends; what runs is left where it is."""


class Slot:
    """Runs trials one after another.

    ended: whether the sweep is to end. watched: called with (trial's state), every POLL seconds; what it returns is the
    verdict on the state's metrics, None where there is none to give.
    """

    def __init__(self, sweep: SweepConfig, folder: Path, ended: Callable[[], bool]) -> None:
        self._sweep, self._folder, self._ended = sweep, folder, ended
        self._group: Any = None
        self._ranks: list[Any] = []

    def run(self, work: Work, watched: Callable[[State], bool | None], lost: Callable[[str], None]) -> Outcome:
        """A trial to its end; if ranks are lost, which `lost` hears of, it resumes from its checkpoint on others."""
        seconds = 0.0
        for _ in range(RETRIES + 1):
            outcome = self._try(work, watched)
            seconds += outcome.seconds
            if outcome.kind != "lost":
                return replace(outcome, seconds=seconds)
            lost(outcome.error)
        return Outcome("failed", seconds, f"given up after {RETRIES + 1} tries: {outcome.error}")

    def _try(self, work: Work, watched: Callable[[State], bool | None]) -> Outcome:
        began = time.monotonic()
        try:
            outcome = self._start() or self._run(work, watched)
        except RayError as error:
            outcome = _lost(error)
        if outcome.kind in ("failed", "lost"):  # ranks may wait for each other, or not be there
            self.release()
        return replace(outcome, seconds=outcome.seconds or time.monotonic() - began)

    def release(self) -> None:
        """End the ranks and give their place back."""
        for rank in self._ranks:
            ray.kill(rank)
        if self._group is not None:
            remove_placement_group(self._group)
        self._ranks, self._group = [], None

    def _start(self) -> Outcome | None:
        """Have ranks that have joined each other; what went wrong if they could not."""
        if self._ranks:
            return None
        self._place()
        try:
            host, port = ray.get(self._ranks[0].open_store.remote(), timeout=JOIN)
            num = len(self._ranks)
            self._wait([rank.join.remote(index, num, host, port) for index, rank in enumerate(self._ranks)])
        except (RayActorError, RayTaskError) as error:
            itself = isinstance(error, RayActorError) and "creation task" in str(error)
            return Outcome("failed" if itself else "lost", error=f"a rank did not start: {_last_line(error)}")
        return None

    def _place(self) -> None:
        """Wait for room for all ranks, and start their processes there."""
        resources = self._sweep.resources
        needs = {"CPU": resources.cpus} | ({"GPU": float(resources.gpus)} if resources.gpus else {})
        self._group = placement_group([needs] * self._sweep.ranks, strategy="PACK")
        placed = self._group.ready()
        while not ray.wait([placed], timeout=POLL)[0]:
            self._check_ended()
        remote: Any = ray.remote(Rank)
        for index in range(self._sweep.ranks):
            where = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
            options = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "scheduling_strategy": where}
            options["max_concurrency"] = THREADS
            self._ranks.append(remote.options(**options).remote(self._folder, resources.cpus, resources.gpus))

    def _wait(self, calls: list[Any]) -> None:
        """Wait for all calls; raises the first error that comes up, though other calls still wait for that rank."""
        deadline = time.monotonic() + JOIN
        while calls:
            done, calls = ray.wait(calls, timeout=POLL)
            ray.get(done)
            self._check_ended()
            if time.monotonic() > deadline:
                raise GetTimeoutError("the ranks did not find each other in time")

    def _run(self, work: Work, watched: Callable[[State], bool | None]) -> Outcome:
        calls = {rank.run.remote(work): index for index, rank in enumerate(self._ranks)}
        outcomes: dict[int, Outcome] = {}
        deadline: float | None = None
        while len(outcomes) < len(self._ranks):
            done, _ = ray.wait([call for call, index in calls.items() if index not in outcomes], timeout=POLL)
            outcomes |= {calls[call]: _outcome(call) for call in done}
            if any(outcome.kind == "failed" for outcome in outcomes.values()):
                break
            if any(outcome.kind == "lost" for outcome in outcomes.values()):
                deadline = deadline or time.monotonic() + GRACE
                if time.monotonic() > deadline:
                    break
            elif not done:
                self._look(watched)
        return _joint(outcomes)

    def _look(self, watched: Callable[[State], bool | None]) -> None:
        """Hand the first rank's state on, and the verdict back."""
        self._check_ended()
        first = self._ranks[0]
        try:
            state: State = ray.get(first.state.remote(), timeout=POLL)
        except RayError:  # busy, or gone: then its call says so
            return
        verdict = watched(state)
        if verdict is not None:
            first.decide.remote(verdict)

    def _check_ended(self) -> None:
        if self._ended():
            raise CallEnds


def _outcome(call: Any) -> Outcome:
    """What a rank returned; a rank that is gone is lost."""
    try:
        outcome: Outcome = ray.get(call)
    except RayError as error:
        return _lost(error)
    return outcome


def _lost(error: RayError) -> Outcome:
    return Outcome("lost", error=f"a rank or its node is gone ({type(error).__name__})")


def _joint(outcomes: Mapping[int, Outcome]) -> Outcome:
    """The trial's outcome: a rank's own failure explains all others, then a loss; else the first rank's."""
    ordered = [outcomes[index] for index in sorted(outcomes)]
    for kind in ("failed", "lost"):
        if found := next((outcome for outcome in ordered if outcome.kind == kind), None):
            return found
    return ordered[0]


def _last_line(error: Exception) -> str:
    """The line of a remote traceback that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
