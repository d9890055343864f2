"""A tracking server that is killed while real jobs log to it: python -m tests.bench.tracking_server

Jobs of the embedded task log to a real `mlflow server`; server and jobs are killed with SIGKILL. At the end every
measure of every metrics.jsonl has to be in MLflow once, and all jobs must have trained alike. Prints what was found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from leap_dist.core.stopwatch import TIMINGS
from leap_dist.run_folder import JOURNAL
from leap_dist.train.meter import RATES
from tests.tracking.servers import Server

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
STEPS = 400
CHECKPOINT_EVERY = 70  # no multiple of log_every


class Job:
    """launch/prune.py in a process of its own."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self._address = folder, address
        self._process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, str(LAUNCH / "prune.py"), "--config", "ds_leap.json", "--output", str(self.folder)]
        settings = {"train.max_steps": STEPS, "train.checkpoint_every": CHECKPOINT_EVERY}
        settings |= {"tracking.mlflow_uri": self._address, "tracking.run_name": self.folder.name}
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DO_NOT_TRACK": "true"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def wait_for(self, step: int) -> None:
        """Until the job has logged a step."""
        while self.lines() == [] or self.lines()[-1]["step"] < step:
            assert self._process.poll() is None, self._process.communicate()[0]
            time.sleep(0.02)

    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl."""
        file = self.folder / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def kill_and_start_again(self) -> None:
        """kill -9; the same command goes on from the last checkpoint."""
        self._process.kill()
        self._process.communicate()
        self._process = self._start()

    def finish(self) -> list[str]:
        """What it said of MLflow, when it has ended well."""
        printed, _ = self._process.communicate(timeout=600)
        assert self._process.returncode == 0, printed
        return [line for line in printed.splitlines() if line.startswith("MLflow")]

    def sync(self) -> str:
        """compare.py --sync."""
        command = [sys.executable, str(LAUNCH / "compare.py"), "--sync", str(self.folder)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def differences(address: str, job: Job, again: bool) -> dict[str, int]:
    """How many measures of metrics.jsonl are missing, there twice, or other values in MLflow; and how many are right.

    again: the job has come by some steps twice; MLflow has the first time's rates and milliseconds.
    """
    from mlflow import MlflowClient

    client = MlflowClient(address)
    experiment = client.get_experiment_by_name("leap")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{job.folder.name}'")
    assert (
        run.info.status == "FINISHED"
        and "leap.target" in run.data.params
        and "gates.json" in {item.path for item in client.list_artifacts(run.info.run_id)}
    )
    found = {"right": 0, "missing": 0, "twice": 0, "other": 0}
    lines = job.lines()
    for key in lines[-1].keys() - {"step", "phase"}:
        logged: dict[int, list[float]] = {}
        for point in client.get_metric_history(run.info.run_id, key):
            logged.setdefault(point.step, []).append(point.value)
        for line in lines:
            values = logged.pop(line["step"], [])
            free = again and key in (*TIMINGS, *RATES)
            same = bool(values) and (free or values[0] == line[key])
            verdict = "missing" if not values else "twice" if len(values) > 1 else "right" if same else "other"
            found[verdict] += 1
        found["other"] += len(logged)  # steps that no line has
    return found


def measure(folder: Path) -> dict[str, Any]:
    """All of it, in a new folder."""
    with Server(folder) as server:
        back = Job(folder / "server comes back", server.address)
        back.wait_for(100)
        server.kill()
        back.wait_for(200)
        server.start()
        told: dict[str, Any] = {back.folder.name: back.finish()}
        pair = [Job(folder / f"server stays away {number}", server.address) for number in (1, 2)]
        for job in pair:
            job.wait_for(100)
        server.kill()
        told |= {job.folder.name: job.finish() for job in pair}
        server.start()
        told |= {f"{job.folder.name}, sync": job.sync() for job in pair}
        killed = Job(folder / "job is killed", server.address)
        killed.wait_for(100)
        server.kill()
        killed.wait_for(180)
        killed.kill_and_start_again()
        killed.wait_for(200)
        server.start()
        told[killed.folder.name] = killed.finish()
        jobs = [back, *pair, killed]
        found = {job.folder.name: differences(server.address, job, again=job is killed) for job in jobs}
    alike = len({json.dumps([line["loss"] for line in job.lines()]) for job in jobs}) == 1
    left = [str(path) for job in jobs if (path := job.folder / JOURNAL).exists()]
    return {"metrics": found, "trained alike": alike, "journals left": left, "told": told}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(Path(scratch)), indent=1, ensure_ascii=False))
