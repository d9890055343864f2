"""tests/bench/gpu.sh without a GPU: it runs through, so that it works the day there is one."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"kernels", "bandwidth", "steps", "selection", "two_of_four"}


@pytest.mark.long
@pytest.mark.slow
def test_it_runs_through_at_small_sizes(tmp_path: Path) -> None:
    command = [str(ROOT / "tests" / "bench" / "gpu.sh"), "--tiny", "--out", str(tmp_path)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_tiny.json").read_text())
    assert found.keys() >= PARTS and not any("failed" in found[part] for part in PARTS)
    rows = found["steps"]["decoder of 1.2 billion"]
    assert rows["element"]["ratio"] == rows["element"]["seconds"] / rows["dense"]["seconds"]
    assert found["kernels"]["checked"] and found["selection"]["sizes"][0]["scores"] == 10**4
