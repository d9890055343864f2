"""A tiny job for sweeps, as files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

JOB: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 8,
    "model": {
        "from_config": {
            "model_type": "bert",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "vocab_size": 32,
            "max_position_embeddings": 16,
        }
    },
    "data": {"task": "builtin/clock"},
    "train": {"max_steps": 40, "eval_batch_size": 512, "log_every": 1, "checkpoint_every": 2},
    "leap": {"target": 0.5},
    "tracking": {"mlflow_uri": None},
}


def sweep_file(folder: Path, job: dict[str, Any] | None = None, **content: Any) -> Path:
    """sweep.json of JOB with some sections replaced; `content` is the sweep's own."""
    (folder / "job.json").write_text(json.dumps(JOB | (job or {})))
    file = folder / "sweep.json"
    file.write_text(json.dumps({"config": str(folder / "job.json")} | content))
    return file


def run_without_ray(file: str, output: str) -> list[str]:
    """How trials ended where Ray is not installed; called on a rank."""
    from leap_dist.sweep.run import run_sweep  # here: who takes JOB alone needs none of it

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        return [result.outcome for result in run_sweep(Path(file), output, None, False, None)]
