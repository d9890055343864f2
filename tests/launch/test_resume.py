"""kill -9 and SIGTERM in all phases of a real job, and the same command again: the files of an undisturbed run."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from leap_dist.core.stopwatch import TIMINGS
from leap_dist.train.meter import RATES
from tests.launch.scripts import Launched

pytestmark = pytest.mark.slow

STEPS = 40
MODEL = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 32,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.1,
}
JOB: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 8,
    "zero_optimization": {"stage": 2},
    "model": {"from_config": MODEL},
    "data": {"task": "builtin/clock"},
    "train": {"max_steps": STEPS, "learning_rate": 1e-3, "checkpoint_every": 2, "log_every": 1, "eval_batch_size": 512},
    "leap": {"target": 0.3, "dense_fraction": 0.25, "settle_fraction": 0.25},
    "tracking": {"mlflow_uri": None},
}


def start(config: Path, output: Path, *more: str) -> Launched:
    arguments = ["--config", str(config), "--output", str(output), *more]
    return Launched("prune", arguments, config.parent / f"{output.name}.log")


def signal_at(job: Launched, output: Path, step: int, number: signal.Signals) -> tuple[int, str]:
    """Exit code and output of a run that gets a signal as soon as it has logged `step`, before it has ended."""
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    with job:
        while time.monotonic() < deadline:
            assert job.runs, job.printed()
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
                job.send(number)
                return job.wait(60), job.printed()
            time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached")


def finish(job: Launched) -> None:
    with job:
        assert job.wait(180) == 0, job.printed()


def measures(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, without how long it took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in (*TIMINGS, *RATES)} for line in lines]


def test_killed_in_every_phase_and_resumed(tmp_path: Path) -> None:
    config = tmp_path / "job.json"
    config.write_text(json.dumps(JOB))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed = start(config, whole)
    assert signal_at(start(config, broken), broken, 5, signal.SIGKILL)[0] == -9  # dense: steps 0 to 9
    finish(undisturbed)
    code, printed = signal_at(start(config, broken), broken, 20, signal.SIGTERM)  # prune
    assert code == 3 and f"{broken} holds an unfinished run of this job: it is resumed\n" in printed
    assert "\nstopped by SIGTERM after step " in printed and "Traceback" not in printed
    assert signal_at(start(config, broken, "--resume"), broken, 34, signal.SIGKILL)[0] == -9  # settle: from step 30
    phases = [json.loads(line)["phase"] for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert {"dense", "prune", "settle"} == set(phases)
    finish(start(config, broken))
    one, other = (json.loads((folder / "certificate.json").read_text()) for folder in (whole, broken))
    assert one == other  # weights, masks, metrics dense and pruned
    assert measures(whole) == measures(broken)
    with start(config, broken, "--resume") as again:
        assert again.wait(60) == 2
    assert "is finished" in again.printed() and "Traceback" not in again.printed()
