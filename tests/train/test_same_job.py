"""A run is resumed by the job file that it was started with."""

from __future__ import annotations

import json
from pathlib import Path

from leap_dist.config.job_file import parse_job
from leap_dist.run_folder import RESOLVED
from leap_dist.train.output import as_logged, check_same_job


def test_weights_of_a_teacher_that_were_filled_in(tmp_path: Path) -> None:
    """They are numbers in the run's folder, and "auto" in the job file."""
    job = {
        "train_micro_batch_size_per_gpu": 2,
        "model": {"name": "m"},
        "data": {"task": "glue/sst2"},
        "train": {"max_steps": 10},
        "leap": {"target": 0.5},
        "distill": {"teacher": "self"},
    }
    config = parse_job(job, "job.json")
    assert config.distill is not None
    started = config.model_copy(update={"distill": config.distill.weighed(False, False)})
    (tmp_path / RESOLVED).write_text(json.dumps(as_logged(started, 1)))
    assert check_same_job("--output", tmp_path, config, 1) == []
