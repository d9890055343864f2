"""A model from files, which transformers hands out in evaluation mode, trains with its dropout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.launch.test_resume import JOB
from tests.ranks import RankPools
from tests.train.test_stream_job import run

SHORT = {"max_steps": 20, "learning_rate": 1e-3, "checkpoint_every": 2, "log_every": 1}


def runs(folder: str) -> list[bool]:
    """Whether dropout was on, of all training steps of a run, of the same run stopped, and of its second part."""
    from leap_dist.train import steps

    place, found = Path(folder), []
    step = steps._train_step

    def seen(job: Any, number: int, meter: Any) -> torch.Tensor:
        found.append(job.engine.module.training)
        return step(job, number, meter)

    run(place / "made", JOB | {"leap": {"target": 1.0, "mode": "one_shot"}, "train": {"eval_batch_size": 512}})
    job = JOB | {"model": {"name": str(place / "made" / "model")}, "train": SHORT}
    steps._train_step = seen
    try:
        said = [run(place / "whole", job), run(place / "broken", job, stop=12), run(place / "broken", job)]
    finally:
        steps._train_step = step
    assert said[0] == said[2] == "" and said[1].startswith("stopped by SIGTERM after step ")
    return found


def test_it_has_it_from_the_first_step_on_and_after_a_resume(ranks: RankPools, tmp_path: Path) -> None:
    (found,) = ranks(1).run(runs, str(tmp_path), timeout=300)
    assert all(found) and len(found) == 40
    whole, broken = (json.loads((tmp_path / name / "certificate.json").read_text()) for name in ("whole", "broken"))
    assert whole == broken
