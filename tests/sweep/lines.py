"""Trials in line, and what runs them in a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from leap_dist.sweep.ladder import ladder_of
from leap_dist.sweep.line import Line
from leap_dist.sweep.rank import Outcome, Work
from leap_dist.sweep.storage import Storage
from leap_dist.sweep.sweep_file import SweepConfig, trials_of

SEARCH: dict[str, Any] = {
    "search": "random",
    "samples": 12,
    "vary": {
        "leap.target": [0.5, 0.2],
        "train.learning_rate": {"loguniform": [1e-5, 1e-2]},
        "leap.dense_fraction": {"uniform": [0.05, 0.3]},
        "leap.gates": {"choice": ["row", ["head", "neuron"]]},
    },
}


def line_of(folder: Path, sweep: SweepConfig) -> Line:
    (folder / "out").mkdir(exist_ok=True)
    trials = ladder_of(sweep) if sweep.mode == "ladder" else trials_of(sweep)
    return Line(sweep, trials, Storage(str(folder / "out"), folder), "accuracy")


def run(line: Line, finish: Callable[[Work], Outcome]) -> list[str]:
    """The trials that a call runs, one after another; a finished one leaves its certificate and its snapshots."""
    seen = []
    while (work := line.take("parent")) is not None:
        name = work.output.name
        assert (work.config.tracking.parent_run, work.config.tracking.run_name) == ("parent", name)
        seen.append(name)
        outcome = finish(work)
        if outcome.kind == "done":
            for folder in work.snapshots.values():
                (folder / "step-1").mkdir(parents=True)
            assert work.branch is None or work.branch.is_dir()
            work.output.mkdir()
            target = work.config.leap.target
            content = {"target": target, "density": target, "unit": 1, "kept": 7, "prunable": 14, "gates": [],
                       "tensors": {}, "metrics": {"pruned": {"accuracy": target}}, "masks_sha256": "a" * 64,
                       "weights_sha256": "b" * 64, "seed": 0, "versions": {}}  # fmt: skip
            (work.output / "certificate.json").write_text(json.dumps(content))
        line.end(name, outcome)
    line.clear()
    return seen


def done(work: Work) -> Outcome:
    return Outcome("failed", 1.0, "no luck") if work.config.leap.target < 0.05 else Outcome("done", 3600.0)
