"""The start of a store: many jobs at once, on a new database and on one of an older MLflow; locks that stay behind."""

from __future__ import annotations

import fcntl
import multiprocessing
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from leap_dist.config.sections import TrackingConfig
from leap_dist.errors import UserError
from leap_dist.files import alone
from leap_dist.tracking import delivery
from leap_dist.tracking import store as store_module
from leap_dist.tracking.mlflow import Tracker
from tests.ranks import forking

pytestmark = pytest.mark.slow

NUM_JOBS = 8
OLDER = "451aebb31d03"  # a schema of MLflow 1


def track(uri: str, name: str, gate: Any, answers: Any) -> None:
    """A job's part: wait for the others, then track a run."""
    delivery.PATIENCE = 200.0  # eight processes on a few cores
    gate.wait(timeout=240)
    try:
        with Tracker(TrackingConfig(mlflow_uri=uri, run_name=name), {"a": 1}, True) as tracker:
            tracker.log(1, {"loss": 1.0})
        answers.put((name, ""))
    except BaseException as error:
        answers.put((name, repr(error)))


def start_all(uri: str, names: list[str], answers: Any) -> None:
    """Eight jobs of one process, which imports MLflow once for them all: it takes seconds."""
    import mlflow  # noqa: F401

    context = multiprocessing.get_context("fork")
    gate = context.Barrier(NUM_JOBS)
    processes = [context.Process(target=track, args=(uri, name, gate, answers)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def track_at_once(uri: str) -> None:
    """Eight jobs that all begin at the same moment; every one has its run."""
    from mlflow import MlflowClient

    context = forking()
    answers = context.Queue()
    names = [f"job{number}" for number in range(NUM_JOBS)]
    starter = context.Process(target=start_all, args=(uri, names, answers))
    try:
        starter.start()
        found = dict(answers.get(timeout=280) for _ in names)
        starter.join()
    finally:
        starter.kill()
        starter.join()
    assert found == dict.fromkeys(names, "")
    client = MlflowClient(uri)
    runs = client.search_runs([item.experiment_id for item in client.search_experiments()])
    assert sorted((run.info.run_name, run.info.status) for run in runs) == [(name, "FINISHED") for name in names]


def make_older(file: Path) -> None:
    """A database as an older MLflow has left it: newer tables are missing, so MLflow brings it up to date."""
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base
    from sqlalchemy import create_engine

    engine = create_engine(f"sqlite:///{file}")
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        config = _get_alembic_config(f"sqlite:///{file}")
        config.attributes["connection"] = connection
        command.upgrade(config, OLDER)
    engine.dispose()


def test_eight_jobs_begin_at_once_on_a_new_store(tmp_path: Path) -> None:
    track_at_once(f"sqlite:///{tmp_path}/new/mlflow.db")
    assert {path.name for path in (tmp_path / "new").iterdir()} <= {"mlflow.db", "mlruns"}


def test_eight_jobs_begin_at_once_on_a_store_of_an_older_mlflow(tmp_path: Path) -> None:
    make_older(tmp_path / "mlflow.db")
    (tmp_path / ".mlflow.db.lock").write_text("of a process that was killed")
    track_at_once(f"sqlite:///{tmp_path}/mlflow.db")


def test_a_block_is_entered_by_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / ".lock"
    with (
        alone(lock, 1.0),
        pytest.raises(TimeoutError, match=r"another process has held .*\.lock for 0 seconds; wait for it, or end"),
        alone(lock, 0.2),
    ):
        pass
    assert not list(tmp_path.iterdir())
    with alone(lock, 0.2):  # a file system where no file can be locked, or made, leaves the machine's own folder
        pass
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with alone(tmp_path / "none" / ".lock", 0.2), pytest.raises(TimeoutError), alone(tmp_path / "none" / ".lock", 0.2):
        pass
    flock = fcntl.flock

    def without_locks(file: Any, how: int) -> None:
        if "temporary" not in file.name:
            raise OSError(38, "Function not implemented")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", without_locks)  # such a file system cannot be mounted here
    with alone(lock, 0.2), pytest.raises(TimeoutError), alone(lock, 0.2):
        pass
    assert not lock.exists() and not list((tmp_path / "temporary").iterdir())


def test_a_store_that_another_process_holds_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "LONGEST_MIGRATION", 0.2)
    tracker = Tracker(TrackingConfig(mlflow_uri=f"sqlite:///{tmp_path}/mlflow.db"), {}, True)
    with (
        alone(tmp_path / ".mlflow.db.lock", 1.0),
        pytest.raises(UserError, match=r"does not take the run: another process has held .*mlflow\.db\.lock for 0 sec"),
        tracker,
    ):
        pass


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("http://[bad", "Invalid IPv6 URL"),
        ("postgresql://127.0.0.1:1/x", "psycopg"),
        ("oracle://x/y", "oracle"),
        ("sqlite:///{folder}/newer.db", "Can't locate revision|out-of-date"),
        ("sqlite:///{folder}/full/folder.db", "unable to open database file|is a directory"),
        ("databricks://nowhere", "databricks|Databricks"),
        ("file:///proc/none", "MLflow has given up folders as stores, and takes a database"),
    ],
)
def test_whatever_a_store_raises_is_one_message(uri: str, why: str, tmp_path: Path, empty_store: Path) -> None:
    (tmp_path / "newer.db").write_bytes(empty_store.read_bytes())
    with sqlite3.connect(tmp_path / "newer.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
        database.execute("DROP TABLE webhooks")
    (tmp_path / "full" / "folder.db").mkdir(parents=True)
    with (
        pytest.raises(UserError, match=rf"^tracking: MLflow at .*({why}).*tracking\.mlflow_uri to null"),
        Tracker(TrackingConfig(mlflow_uri=uri.format(folder=tmp_path)), {}, True),
    ):
        pass


@pytest.mark.parametrize("name", ["it's", 'a "b"', "`x`", "%", "' or 1=1 --"])
def test_a_trial_of_any_name_is_found_again(name: str, tmp_path: Path, empty_store: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    ids = []
    for _ in range(2):
        with Tracker(TrackingConfig(mlflow_uri=uri, run_name=name, parent_run="0" * 32), {}, True) as tracker:
            ids.append(tracker.run_id)
    assert ids[0] == ids[1]
