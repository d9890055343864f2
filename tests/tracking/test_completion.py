"""A run that is killed once it has its certificate: the same command leaves what an undisturbed run does."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leap_dist.errors import UserError
from leap_dist.run_folder import CHECKPOINTS, RANKS
from leap_dist.tracking.completion import complete, is_incomplete
from leap_dist.tracking.journal import Journal
from leap_dist.tracking.mlflow import sync
from tests.launch.test_prune import run_in_rank
from tests.ranks import RankError, RankPools
from tests.sweep.jobs import JOB
from tests.tracking.folders import run_folder

pytestmark = pytest.mark.slow

TRAIN = {"train": {**JOB["train"], "max_steps": 10, "checkpoint_every": 3}}
TIMES = ("leap_ms", "_per_second", "memory_mb", "system/")  # in the names of what differs between equal runs


def killed(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_kill(job: dict[str, Any], output: str, at: str) -> None:
    """Run a job whose process is killed: as its certificate is there, amid its checkpoints, or before its page."""
    from leap_dist.train import folder_writer, loop

    write, remove = loop.cert.write, shutil.rmtree

    def certify(*arguments: Any) -> None:
        write(*arguments)
        killed()

    def remove_one(path: Any, *arguments: Any, **options: Any) -> None:
        if Path(path).name == CHECKPOINTS:
            remove(next(Path(path).glob("step-*")))
            killed()
        remove(path, *arguments, **options)

    points: dict[str, tuple[Any, str, Callable[..., None]]] = {
        "certificate": (loop.cert, "write", certify),
        "checkpoints": (shutil, "rmtree", remove_one),
        "page": (folder_writer, "write_report", killed),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*points[at])
        run_in_rank(job, output)


def try_again(job: dict[str, Any], output: str) -> str:
    """As Ray has a trial tried again whose rank was killed; how it ends."""
    from leap_dist.config.job_file import parse_job
    from leap_dist.sweep.rank import Rank, Work

    rank = Rank(1.0, 0)
    rank.join(Path(output).parent)
    return rank.run(Work(parse_job(job), Path(output))).kind


def recorded(uri: str, name: str) -> dict[str, Any]:
    """What MLflow has of a run, without times and what is the run's own."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("leap")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`mlflow.runName` = '{name}'")
    (model,) = client.search_logged_models([experiment.experiment_id], f"source_run_id = '{run.info.run_id}'")
    points = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    (version,) = client.search_model_versions(f"run_id = '{run.info.run_id}'")
    assert run.outputs is not None
    (output,) = run.outputs.model_outputs
    return {
        "status": (run.info.status, model.status, version.name),
        "names": sorted(key for key in points if "system/" not in key),
        "metrics": {
            key: [(p.step, p.value) for p in found]
            for key, found in points.items()
            if not any(part in key for part in TIMES)
        },
        "artifacts": sorted(item.path for item in client.list_artifacts(run.info.run_id)),
        "tags": {key: text for key, text in model.tags.items() if key.startswith("leap.")},
        "model": sorted({(m.key, m.step) for m in model.metrics or () if "system/" not in m.key}),
        "files": sorted(item.path for item in client.list_logged_model_artifacts(model.model_id)),
        "step": output.step,
    }


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, empty_store: Path, ranks: RankPools
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The folder of a run, its job, and what its store has of it."""
    folder = tmp_path_factory.mktemp("ends")
    uri = f"sqlite:///{shutil.copy(empty_store, folder)}"
    job = JOB | TRAIN | {"tracking": {"mlflow_uri": uri, "register": "clock"}}
    assert ranks(1).run(run_in_rank, job, str(folder / "whole")) == [""]
    found = recorded(uri, "whole")
    assert {"dense_accuracy", "pruned_accuracy", "pruned_density", "leap_ms"} <= set(found["names"])
    assert found["status"] == ("FINISHED", "READY", "clock") and "gates.json" in found["artifacts"]
    return folder / "whole", job, found


@pytest.mark.parametrize("at", ["certificate", "checkpoints", "page"])
def test_a_run_that_is_killed_at_its_end_is_as_one_that_is_not(
    undisturbed: tuple[Path, dict[str, Any], dict[str, Any]], ranks: RankPools, at: str
) -> None:
    whole, job, found = undisturbed
    folder = whole.with_name(at)
    with pytest.raises(RankError):
        ranks(1).run(run_and_kill, job, str(folder), at)
    assert (folder / "certificate.json").is_file() and not (folder / "report.html").exists()
    if at == "page":
        assert ranks(1).run(try_again, job, str(folder)) == ["done"]
    else:
        assert ranks(1).run(run_in_rank, job, str(folder)) == [""]
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert recorded(job["tracking"]["mlflow_uri"], at) == found
    (refused,) = ranks(1).run(run_in_rank, job, str(folder))
    assert "is finished; its result is in " in refused


def test_what_a_run_removes_at_its_end_is_removed_later_and_a_link_stays(tmp_path: Path) -> None:
    folder, told = run_folder(tmp_path / "run"), list[str]()
    complete(folder, None, told.append)
    assert not is_incomplete(folder)
    (folder / CHECKPOINTS / "step-00000004").mkdir(parents=True)
    (folder / RANKS).mkdir()
    assert is_incomplete(folder)
    with (folder / RANKS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is finished, and another process is still writing to the folder; wait"):
            complete(folder, None, told.append)
    complete(folder, None, told.append)
    assert not is_incomplete(folder) and not (folder / CHECKPOINTS).exists() and not (folder / RANKS).exists()
    assert told[1:] == [
        f"the run in {folder} is finished; {name} was left, and is removed now" for name in (CHECKPOINTS, RANKS)
    ]
    (tmp_path / "elsewhere").mkdir()
    (folder / CHECKPOINTS).symlink_to(tmp_path / "elsewhere")
    assert not is_incomplete(folder)


def test_the_last_records_of_a_run_send_no_file_of_another_folder(tmp_path: Path) -> None:
    folder, elsewhere = run_folder(tmp_path / "run"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "plots").symlink_to(elsewhere)
    journal = Journal(folder)
    journal.describe(uri="sqlite:///none.db", status="RUNNING")
    journal.close(remove=False)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"--sync: .*mlflow.jsonl names '.*/elsewhere', which is not in that folder"
        ):
            sync(folder, None)
