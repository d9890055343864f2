"""Real sweeps on a Ray cluster of three nodes of one CPU: kills, failures, ladders, refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from leap_dist.errors import UserError
from leap_dist.sweep.run import run_sweep
from tests.launch.test_prune import run_in_rank
from tests.ranks import RankPools
from tests.sweep.conftest import NODE
from tests.sweep.jobs import JOB, run_without_ray, sweep_file

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


def last_step(folder: Path) -> int:
    """Of the checkpoints of a trial."""
    whole = (folder / "checkpoints").glob("step-*/manifest.json")
    return max((int(file.parent.name.removeprefix("step-")) for file in whole), default=0)


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


def kill_node(cluster: Cluster, ranks: list[int]) -> None:
    """End one that ranks run on, not the driver's; a new one takes its place."""
    raylets = {node.all_processes["raylet"][0].process.pid: node for node in cluster.worker_nodes}
    parents = [int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1]) for rank in ranks]
    gone = next(parent for parent in parents if parent in raylets)
    os.kill(gone, signal.SIGKILL)
    cluster.remove_node(raylets[gone], allow_graceful=False)
    cluster.add_node(**NODE)


@pytest.mark.long
def test_a_killed_rank_a_killed_driver_and_a_killed_node_lose_and_repeat_nothing(
    tmp_path: Path, three_nodes: Cluster, ranks: RankPools
) -> None:
    job = {"zero_optimization": {"stage": 2}}
    cases = [{"leap.target": 0.5, "train.max_steps": 10}, {"leap.target": 0.3, "train.max_steps": 400}]
    file, out, told = sweep_file(tmp_path, job, cases=cases, ranks=2), tmp_path / "out", tmp_path / "driver.txt"
    short, long = out / "0.5_10", out / "0.3_400"

    driver = start(file, out, three_nodes.address)
    wait_until(lambda: last_step(long) > 0, driver, told)
    finished = (short / "certificate.json").stat().st_mtime_ns
    os.kill(rank_processes(tmp_path)[0], signal.SIGKILL)
    step = last_step(long)
    wait_until(lambda: last_step(long) > step, driver, told)
    assert re.search(r"0\.3_400: .* is gone.*; it resumes from its last checkpoint", told.read_text())
    orphans = set(rank_processes(tmp_path))
    driver.kill()
    driver.wait()

    again = start(file, out, three_nodes.address)
    wait_until(lambda: orphans.isdisjoint(rank_processes(tmp_path)), again, told)  # Ray ends them some seconds later
    step = last_step(long)
    wait_until(lambda: last_step(long) > step, again, told)
    told.write_text("")
    kill_node(three_nodes, rank_processes(tmp_path))
    assert again.wait(timeout=180) == 0, told.read_text()
    assert re.search(r"0\.3_400: .*; it resumes from its last checkpoint", told.read_text())

    assert (short / "certificate.json").stat().st_mtime_ns == finished
    for folder, settings in zip((short, long), cases, strict=True):
        train = {**JOB["train"], "max_steps": settings["train.max_steps"]}
        plain = JOB | job | {"leap": {"target": settings["leap.target"]}, "train": train}
        whole = tmp_path / folder.name
        assert ranks(2).run(run_in_rank, plain, str(whole)) == ["", ""]
        found, expected = ((run / "certificate.json").read_text() for run in (folder, whole))
        assert json.loads(found) == json.loads(expected)


@pytest.mark.long
def test_a_search_learns_from_trials_and_outlives_those_that_fail_or_are_behind(
    tmp_path: Path,
    three_nodes: Cluster,
    quiet_ray: None,
    capsys: pytest.CaptureFixture[str],
    empty_store: Path,
    ranks: RankPools,
) -> None:
    shutil.copy(empty_store, tmp_path)
    tracking = {"tracking": {"mlflow_uri": f"sqlite:///{tmp_path}/mlflow.db"}}
    search = {"search": "optuna", "samples": 4, "early_stop": "asha", "metric": "loss"}
    vary = {"leap.target": [0.001, 0.5], "train.learning_rate": {"loguniform": [1e-4, 1e-2]}}
    file, out = sweep_file(tmp_path, tracking, vary=vary, at_once=1, **search), tmp_path / "out"
    results = run_sweep(file, str(out), three_nodes.address, False, None)
    kinds = [result.outcome for result in results]
    told = capsys.readouterr().out
    assert len(results) == 4 and set(kinds) == {"failed", "done", "stopped"}
    best = min(result.value for result in results if result.value is not None)
    ended, judged = (list(map(json.loads, (out / f"{n}.jsonl").read_text().splitlines())) for n in ("trials", "rungs"))
    assert [line["trial"] for line in ended] == [result.name for result in results]
    for result in results:
        if result.outcome == "failed":
            assert f"{result.name} failed: leap.target: 0.001 cannot be reached" in told
        if result.outcome == "stopped":
            assert not (out / result.name / "checkpoints").exists()
            (last,) = (line for line in judged if line["trial"] == result.name and not line["goes_on"])
            others = [line["metrics"]["loss"] for line in judged if line["rung"] == last["rung"] and line["goes_on"]]
            assert last["metrics"]["loss"] > min(others)
    assert any(result.front for result in results if result.value == best)
    check_runs(tmp_path, 4, kinds.count("done"), kinds.count("stopped"))

    vary["leap.target"] = [0.5, 0.3]
    file = sweep_file(tmp_path, vary=vary, search="optuna", samples=3)
    assert ranks(1).run(run_without_ray, str(file), str(tmp_path / "alone")) == [["done"] * 3]
    assert (tmp_path / "alone" / "optuna.log").is_file() and (tmp_path / "alone" / "settings.png").is_file()
    assert "over each setting that was searched" in (tmp_path / "alone" / "report.html").read_text()


def check_runs(folder: Path, num: int, num_done: int, num_stopped: int) -> None:
    """One parent, and one child for each trial that began to train."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("leap")
    assert experiment is not None
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = found.pop("sweep")
    assert parent.data.metrics == {"trials": float(num), "done": float(num_done)} and parent.info.status == "FINISHED"
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {parent.info.run_id}
    assert sorted(run.info.status for run in found.values()) == ["FINISHED"] * num_done + ["KILLED"] * num_stopped


def test_a_ladder_costs_its_walk_and_a_few_steps_a_rung_with_ray_and_without(
    tmp_path: Path, three_nodes: Cluster, quiet_ray: None, capsys: pytest.CaptureFixture[str], ranks: RankPools
) -> None:
    file = sweep_file(tmp_path, mode="ladder", vary={"leap.target": [0.7, 0.4, 0.2]}, at_once=1)
    results = run_sweep(file, str(tmp_path / "out"), three_nodes.address, False, None)
    assert [result.outcome for result in results] == ["done"] * 3
    assert [result.density for result in results] == pytest.approx([0.7, 0.4, 0.2], abs=0.01)
    lines = [(tmp_path / "out" / name / "metrics.jsonl").read_text().splitlines() for name in ("0.7", "0.4", "0.2")]
    assert [len(text) for text in lines] == [9, 9, 40]  # a rung: the last step of its prune phase, and 8 to settle
    assert not (tmp_path / "out" / ".snapshots").exists()
    capsys.readouterr()
    assert run_sweep(file, str(tmp_path / "out"), "127.0.0.1:1", True, None) == results  # needs no cluster any more
    assert "0.7" in capsys.readouterr().out
    assert ranks(1).run(run_without_ray, str(file), str(tmp_path / "alone")) == [["done"] * 3]
    for name in ("0.7", "0.4", "0.2"):
        found, expected = ((tmp_path / out / name / "certificate.json").read_text() for out in ("alone", "out"))
        assert json.loads(found) == json.loads(expected)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"ranks": 4}, r"ranks: got 4, each with 1 CPUs and 0 GPUs, but the cluster has room for 3 \(.*: 1 CPUs"),
        ({"resources": {"cpus": 2}}, r"ranks: got 1, each with 2 CPUs and 0 GPUs, but the cluster has room for 0"),
        ({"resources": {"gpus": 1}}, r"each with 1 CPUs and 1 GPUs, but .* lower ranks or resources, or add nodes"),
    ],
)
def test_what_can_never_fit_is_refused(
    tmp_path: Path, three_nodes: Cluster, quiet_ray: None, more: dict[str, Any], match: str
) -> None:
    file = sweep_file(tmp_path, vary={"leap.target": [0.5]}, **more)
    with pytest.raises(UserError, match=match):
        run_sweep(file, str(tmp_path / "out"), three_nodes.address, False, None)
    assert not (tmp_path / "out" / "sweep.json").exists()
