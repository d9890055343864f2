"""kill -9 and SIGTERM in all phases of a real job, and the same command again: the files of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from leap_dist.core.stopwatch import TIMINGS
from leap_dist.train.meter import RATES

ROOT = Path(__file__).resolve().parents[2]
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


def start(config: Path, output: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        str(ROOT / "launch" / "prune.py"),
        "--config",
        str(config),
        "--output",
        str(output),
        *more,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def signal_at(process: subprocess.Popen[bytes], output: Path, step: int, number: signal.Signals) -> tuple[int, str]:
    """Exit code and output of a run that gets a signal as soon as it has logged `step`, before it has ended."""
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, (process.stdout.read() if process.stdout else b"").decode()
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
            process.send_signal(number)
            printed, _ = process.communicate(timeout=60)
            return process.returncode, printed.decode()
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached")


def finish(process: subprocess.Popen[bytes]) -> None:
    printed, _ = process.communicate(timeout=180)
    assert process.returncode == 0, printed.decode()


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
    assert code == 3 and f"{broken} holds an unfinished run of this job: it goes on\n" in printed
    assert "\nstopped by SIGTERM after step " in printed and "Traceback" not in printed
    assert signal_at(start(config, broken, "--resume"), broken, 34, signal.SIGKILL)[0] == -9  # settle: from step 30
    phases = [json.loads(line)["phase"] for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert {"dense", "prune", "settle"} == set(phases)
    finish(start(config, broken))
    one, other = (json.loads((folder / "certificate.json").read_text()) for folder in (whole, broken))
    assert one == other  # weights, masks, metrics dense and pruned
    assert measures(whole) == measures(broken)
    again = start(config, broken, "--resume")
    printed, _ = again.communicate(timeout=60)
    assert again.returncode == 2 and b"is finished" in printed and b"Traceback" not in printed
