"""Real sweeps on a Ray cluster of three nodes of one CPU: kills, failures, ladders, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leap_dist.errors import UserError
from leap_dist.sweep.run import run_sweep
from tests.launch.test_prune import run_in_rank
from tests.ranks import RankPools
from tests.sweep.jobs import JOB, sweep_file

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def start(file: Path, output: Path, address: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), "--config", str(file), "--output", str(output)]
    with (output.parent / "driver.txt").open("a") as log:
        return subprocess.Popen(
            [*command, "--address", address], cwd=output.parent, stdout=log, stderr=subprocess.STDOUT, text=True
        )


def wait_until(happened: Callable[[], bool], driver: subprocess.Popen[str], told: Path) -> None:
    deadline = time.monotonic() + 180
    while not happened():
        assert driver.poll() is None and time.monotonic() < deadline, told.read_text()
        time.sleep(0.02)


def has_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("step-*/manifest.json"))


def rank_processes(folder: Path) -> list[int]:
    """The sweep's ranks: Ray names its processes by their class, and ours have changed to the driver's folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if b"ray::Rank" in (place / "cmdline").read_bytes() and (place / "cwd").resolve() == folder:
                found.append(int(place.name))
        except OSError:
            continue
    return found


@pytest.mark.long
def test_a_killed_rank_and_a_killed_driver_lose_and_repeat_nothing(
    tmp_path: Path, three_nodes: str, ranks: RankPools
) -> None:
    job = {"train": {**JOB["train"], "max_steps": 100}, "zero_optimization": {"stage": 2}}
    file, out, told = (
        sweep_file(tmp_path, job, vary={"leap.target": [0.5, 0.3]}, ranks=2),
        tmp_path / "out",
        "driver.txt",
    )
    driver = start(file, out, three_nodes)
    wait_until(lambda: has_checkpoint(out / "0.5"), driver, tmp_path / told)
    os.kill(rank_processes(tmp_path)[0], signal.SIGKILL)
    wait_until(lambda: has_checkpoint(out / "0.3"), driver, tmp_path / told)
    driver.kill()
    driver.wait()
    assert "0.5: another rank is gone; it resumes" in (text := (tmp_path / told).read_text()) or "is gone (" in text
    finished = (out / "0.5" / "certificate.json").stat().st_mtime_ns
    assert not (out / "0.3" / "certificate.json").exists()
    again = start(file, out, three_nodes)
    assert again.wait(timeout=180) == 0, (tmp_path / told).read_text()
    assert (out / "0.5" / "certificate.json").stat().st_mtime_ns == finished
    for target in ("0.5", "0.3"):
        plain, whole = JOB | job | {"leap": {"target": float(target)}}, tmp_path / target
        assert ranks(2).run(run_in_rank, plain, str(whole)) == ["", ""]
        found, expected = ((folder / "certificate.json").read_text() for folder in (out / target, whole))
        assert json.loads(found) == json.loads(expected)


def test_a_trial_that_fails_by_itself_stops_no_other_and_one_behind_is_stopped_early(
    tmp_path: Path, three_nodes: str, quiet_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [{"leap.gates": "row", "leap.target": 0.001}, {"train.seed": 1}, {"train.seed": 2}]
    tracking = {"tracking": {"mlflow_uri": f"sqlite:///{tmp_path}/mlflow.db"}}
    file, out = (
        sweep_file(tmp_path, tracking, cases=cases, at_once=1, early_stop="asha", metric="loss"),
        tmp_path / "out",
    )
    results = run_sweep(file, str(out), three_nodes, False, None)
    assert [result.outcome for result in results][:2] == ["failed", "done"]
    assert results[1].front or results[2].front
    assert results[2].outcome in ("done", "stopped")
    assert f"{results[0].name} failed: leap.target: 0.001 cannot be reached" in capsys.readouterr().out
    ended = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    assert [line["trial"] for line in ended] == [result.name for result in results]
    assert results[2].outcome == "done" or ended[2]["metrics"]["loss"] > results[1].value
    check_runs(tmp_path, 1 + (results[2].outcome == "done"))


def check_runs(folder: Path, num_done: int) -> None:
    """One parent, and one child for each trial that began."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("leap")
    assert experiment is not None
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = found.pop("sweep")
    assert parent.data.metrics == {"trials": 3.0, "done": float(num_done)} and parent.info.status == "FINISHED"
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {parent.info.run_id}
    assert sorted(run.info.status for run in found.values()) == ["FINISHED", "FINISHED" if num_done == 2 else "KILLED"]


@pytest.mark.long
def test_a_ladder_costs_its_walk_and_a_few_steps_a_rung(
    tmp_path: Path, three_nodes: str, quiet_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sweep_file(tmp_path, mode="ladder", vary={"leap.target": [0.7, 0.4, 0.2]}, at_once=1)
    results = run_sweep(file, str(tmp_path / "out"), three_nodes, False, None)
    assert [result.outcome for result in results] == ["done"] * 3
    assert [result.density for result in results] == pytest.approx([0.7, 0.4, 0.2], abs=0.01)
    lines = [(tmp_path / "out" / name / "metrics.jsonl").read_text().splitlines() for name in ("0.7", "0.4", "0.2")]
    assert [len(text) for text in lines] == [9, 9, 40]  # a rung: the last step of its prune phase, and 8 to settle
    assert not (tmp_path / "out" / ".snapshots").exists()
    capsys.readouterr()
    assert run_sweep(file, str(tmp_path / "out"), "127.0.0.1:1", True, None) == results  # needs no cluster any more
    assert "0.7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"ranks": 4}, r"ranks: got 4, each with 1 CPUs and 0 GPUs, but the cluster has room for 3 \(.*: 1 CPUs"),
        ({"resources": {"cpus": 2}}, r"ranks: got 1, each with 2 CPUs and 0 GPUs, but the cluster has room for 0"),
        ({"resources": {"gpus": 1}}, r"each with 1 CPUs and 1 GPUs, but .* lower ranks or resources, or add nodes"),
    ],
)
def test_what_can_never_fit_is_refused(
    tmp_path: Path, three_nodes: str, quiet_ray: None, more: dict[str, Any], match: str
) -> None:
    file = sweep_file(tmp_path, vary={"leap.target": [0.5]}, **more)
    with pytest.raises(UserError, match=match):
        run_sweep(file, str(tmp_path / "out"), three_nodes, False, None)
    assert not (tmp_path / "out" / "sweep.json").exists()
