"""A disk that is full, at each kind of write of a run: what only reports never ends it, and is made later."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leap_dist.console import console
from tests.disks import fill, free
from tests.launch.test_prune import JOB
from tests.ranks import RankPools

pytestmark = pytest.mark.slow

LOGGED = JOB | {"train": {**JOB["train"], "log_every": 1, "checkpoint_every": 10}}
PICTURES = {f"{name}{end}" for name in ("course", "kept", "scores") for end in (".png", ".svg", "_dark.svg")}


def run_beside(disk: str, job: dict[str, Any], full_at: int, free_at: int, before: str = "") -> tuple[str, str]:
    """Run a job whose disk is full from one logged step to another, or from right before a file on; what was printed,
    and what was refused."""
    import torch

    from leap_dist.config.job_file import parse_job
    from leap_dist.errors import UserError
    from leap_dist.train import folder_writer, loop
    from leap_dist.train.watch import Watch
    from leap_dist.zero.ranks import Ranks

    place, refused, printed = Path(disk), "", io.StringIO()

    def told(step: int, total: int, measures: Any) -> None:
        if step == full_at:
            fill(place)
        if step == free_at:
            free(place)

    def filled_first(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **options: (fill(place), function(*arguments, **options))[1]

    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    patch = pytest.MonkeyPatch()
    points = {
        "page": (folder_writer, "write_report"),
        "certificate": (loop.cert, "build"),
        "model": (loop, "save_model"),
    }
    with contextlib.redirect_stdout(printed), patch.context() as patched:
        if before:
            owner, name = points[before]
            patched.setattr(owner, name, filled_first(getattr(owner, name)))
        try:
            loop.run_job(
                parse_job(job), place / "run", False, Ranks(rank, world, torch.device("cpu")), Watch(notify=told)
            )
        except UserError as error:
            refused = str(error)
    return printed.getvalue(), refused


def check_result(run: Path) -> None:
    """Certificate, model, config, all lines and all pictures are there."""
    certificate = json.loads((run / "certificate.json").read_text())
    assert abs(certificate["kept"] - 0.3 * certificate["prunable"]) <= 1
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 31))
    assert json.loads((run / "config.json").read_text())["leap"]["target"] == 0.3
    assert {path.name for path in (run / "plots").iterdir()} == PICTURES
    assert sorted(path.name for path in run.iterdir()) == [
        "certificate.json", "config.json", "metrics.jsonl", "model", "plots", "report.html", "scores.json",
    ]  # fmt: skip


def test_metrics_and_journal_wait_for_room(small_disk: Path, ranks: RankPools) -> None:
    job = LOGGED | {"tracking": {"mlflow_uri": f"sqlite:///{small_disk.parent}/mlflow.db", "experiment": "e"}}
    printed, refused = ranks(1).run(run_beside, str(small_disk), job, 3, 27)[0]
    assert refused == "" and printed.count("metrics.jsonl cannot be written: No space left on device") == 1
    assert "MLflow" not in printed
    check_result(small_disk / "run")
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{small_disk.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("e")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 30 and run.info.status == "FINISHED"


def test_a_page_that_could_not_be_made_is_made_by_the_same_command(small_disk: Path, ranks: RankPools) -> None:
    run = small_disk / "run"
    printed, refused = ranks(1).run(run_beside, str(small_disk), LOGGED, 0, 0, "page")[0]
    assert refused == "" and (run / "certificate.json").is_file() and not (run / "report.html").exists()
    assert printed.count("could not be made: No space left on device; the run is complete; ") == 1
    assert not list(run.rglob("*.partial"))
    written = (run / "certificate.json").stat().st_mtime_ns
    _, refused = ranks(1).run(run_beside, str(small_disk), LOGGED, 0, 0)[0]
    assert refused.startswith(f"{run}/report.html cannot be written: No space left on device; make room")
    free(small_disk)
    (run / "plots").mkdir(exist_ok=True)
    (run / "plots" / "course.png").touch()
    printed, refused = ranks(1).run(run_beside, str(small_disk), LOGGED, 0, 0)[0]
    assert refused == "" and "its pictures and report.html were missing, and are there now" in printed
    assert (run / "certificate.json").stat().st_mtime_ns == written
    check_result(run)
    _, refused = ranks(1).run(run_beside, str(small_disk), LOGGED, 0, 0)[0]
    assert refused.startswith(f"--output: the run in {run} is finished; its result is in ")


@pytest.mark.parametrize(("before", "file"), [("model", "model"), ("certificate", "certificate.json")])
def test_a_result_that_cannot_be_written_is_one_message_and_the_run_resumes(
    small_disk: Path, ranks: RankPools, before: str, file: str
) -> None:
    run = small_disk / "run"
    printed, refused = ranks(1).run(run_beside, str(small_disk), LOGGED, 0, 0, before)[0]
    assert refused.startswith(f"{run / file} cannot be written: ") and "No space left on device" in refused
    assert "make room, and start the same command again: it resumes" in refused
    assert not (run / "certificate.json").exists()
    free(small_disk)
    printed, refused = ranks(1).run(run_beside, str(small_disk), LOGGED, 0, 0)[0]
    assert refused == "" and "holds an unfinished run" in printed
    check_result(run)


def test_a_disk_that_is_full_from_the_start_and_then_is_not(small_disk: Path, ranks: RankPools) -> None:
    fill(small_disk)
    printed, refused = ranks(1).run(run_beside, str(small_disk), LOGGED, 0, 5)[0]
    assert refused == "" and printed.count("config.json cannot be written: No space left on device") == 1
    check_result(small_disk / "run")


def remove_at(output: str, job: dict[str, Any], step_of_it: int) -> str:
    """Run a job whose folder is removed by the first rank's side; what is refused."""
    import torch

    from leap_dist.config.job_file import parse_job
    from leap_dist.errors import UserError
    from leap_dist.train.loop import run_job
    from leap_dist.train.watch import Watch
    from leap_dist.zero.ranks import Ranks

    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()

    def told(step: int, total: int, measures: Any) -> None:
        if step == step_of_it and rank == 0:
            shutil.rmtree(output)

    try:
        run_job(parse_job(job), Path(output), False, Ranks(rank, world, torch.device("cpu")), Watch(notify=told))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("step", [5, 10, 30])
def test_a_folder_that_is_removed_on_the_way_is_one_message_on_every_rank(
    tmp_path: Path, ranks: RankPools, step: int, capfd: pytest.CaptureFixture[str]
) -> None:
    job = LOGGED | {"zero_optimization": {"stage": 2}}
    refused = ranks(2).run(remove_at, str(tmp_path / "run"), job, step)
    words = "was removed or renamed while the run was writing to it; start the run again"
    assert refused == [f"--output: {tmp_path}/run {words}"] * 2
    assert not list(tmp_path.iterdir())
    assert "Traceback" not in capfd.readouterr().err


def test_output_that_nobody_takes_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        console().print("a line")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # so that it can be closed
