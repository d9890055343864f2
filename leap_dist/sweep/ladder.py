"""A ladder: one run walks down to the lowest target, and at each higher one a short run branches off to settle there.

The walk is an ordinary run to the lowest target. Its level comes down step by step, so it passes every higher target;
one step before it does, it leaves a snapshot. A rung is a job that resumes from there as if it had been interrupted:
its schedule says that the prune phase ends with the next step, exactly at its own target, and that as many steps
follow to settle as in the walk. n targets cost one run and n - 1 settle phases. Where the walk passes a target in its
very first steps, as it may without a dense phase, there is nothing to branch off from: that rung starts by itself.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from leap_dist.config.section import show
from leap_dist.config.sections import JobConfig
from leap_dist.core.phases import Schedule
from leap_dist.errors import UserError
from leap_dist.files import staged
from leap_dist.secrets import hide_in
from leap_dist.sweep.grid import Settings, names
from leap_dist.sweep.sweep_file import TARGET, SweepConfig, Trial, combinations, job_of

SNAPSHOTS = ".snapshots"


def ladder_of(sweep: SweepConfig) -> list[Trial]:
    """Rungs from the highest down, each walk after its own. Raises UserError for what is no ladder."""
    found = combinations(sweep)
    name = {json.dumps(settings): name for settings, name in zip(found, names(found), strict=True)}
    walks: dict[str, list[Settings]] = {}
    for settings in found:
        if TARGET not in settings:
            raise UserError(f"vary: {TARGET} is missing; a ladder walks down its values")
        rest = {key: value for key, value in settings.items() if key != TARGET}
        walks.setdefault(json.dumps(rest, sort_keys=True), []).append(settings)
    trials: list[Trial] = []
    for group in walks.values():
        for settings in group:
            job_of(sweep, settings)  # each target has to be one, before they are compared
        lowest, *higher = sorted(group, key=lambda settings: float(settings[TARGET]))
        if not higher:
            raise UserError(f"vary.{TARGET}: got {show([lowest[TARGET]])}; a ladder needs two targets or more")
        trials += _walk(sweep, lowest, higher[::-1], name)
    return trials


def _walk(sweep: SweepConfig, lowest: Settings, higher: list[Settings], name: dict[str, str]) -> list[Trial]:
    config = job_of(sweep, {**lowest, "leap.tokens_per_step": None})  # rungs have the walk's levels, not their own
    if config.train.max_steps is None:
        raise UserError("train.max_steps: missing; a ladder needs the number of steps of its walk, in place of epochs")
    leap = config.leap
    if leap.measure != "weights":
        raise UserError(
            f'leap.measure: got "{leap.measure}"; a ladder branches off at densities; allowed: "weights", or a '
            "sweep that trains each target"
        )
    unfit = {"mode": leap.mode != "train", "start": leap.start is not None, "weights": leap.frozen}
    if key := next((key for key, found in unfit.items() if found), None):
        raise UserError(
            f"leap.{key}: got {show(getattr(leap, key))}; a ladder branches off a run that comes down to its target "
            "and settles; allowed: one that trains masks and weights, or a sweep that runs each target"
        )
    schedule = Schedule(config.train.max_steps, leap.dense_fraction, leap.settle_fraction, leap.target)
    walk = name[json.dumps(lowest)]
    snapshots: dict[int, str] = {}
    rungs = []
    for settings in higher:
        start = rung_start(schedule, settings[TARGET])
        if start > 1:
            snapshots[start - 1] = f"{SNAPSHOTS}/{walk}/{start - 1}"
        rung = job_of(sweep, {**settings, **_rung_settings(schedule, start)})
        rungs.append(Trial(name[json.dumps(settings)], settings, rung, branch=snapshots.get(start - 1)))
    return [*rungs, Trial(walk, lowest, config, snapshots)]


def rung_start(schedule: Schedule, target: float) -> int:
    """The first step of a rung's settle phase: the walk's level is at or below the target from there on."""
    steps = range(schedule.dense_end + 1, schedule.settle_start)
    return next((step for step in steps if schedule.level(step) <= target), schedule.settle_start)


def _rung_settings(schedule: Schedule, start: int) -> Settings:
    """The rung as a job: as the walk up to `start`, then a settle phase as long as the walk's."""
    total = start + schedule.total_steps - schedule.settle_start
    return {
        "train.max_steps": total,
        "leap.total_steps": None,
        "leap.tokens_per_step": None,
        "leap.dense_fraction": schedule.dense_end / total,
        "leap.settle_fraction": (total - start) / total,
    }


def is_there(snapshot: Path) -> bool:
    """Whether the walk has left it."""
    return any(snapshot.glob("step-*"))


def branch_off(snapshot: Path, output: Path, config: JobConfig) -> None:
    """Make a run folder that looks as if the rung had been interrupted at the snapshot."""
    from leap_dist.run_folder import CHECKPOINTS, RESOLVED

    checkpoint = next(snapshot.glob("step-*"))
    with staged(output) as partial:
        shutil.copytree(checkpoint, partial / CHECKPOINTS / checkpoint.name)
        job = hide_in(config.resolved())
        (partial / RESOLVED).write_text(json.dumps(job, indent=2) + "\n", encoding="utf-8")
