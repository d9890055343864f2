"""Stores that are down, locked or refuse: what a run does then, and how its records come to MLflow later."""

from __future__ import annotations

import http.server
import json
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest

from leap_dist.config.sections import TrackingConfig
from leap_dist.errors import UserError
from leap_dist.run_folder import JOURNAL
from leap_dist.secrets import remember_all
from leap_dist.tracking import delivery
from leap_dist.tracking.completion import complete, is_incomplete
from leap_dist.tracking.journal import Journal
from leap_dist.tracking.mlflow import Tracker, parameters, sync
from leap_dist.tracking.store import PARENT, begin, without_credentials
from tests.test_errors import NASTY
from tests.tracking.folders import run_folder
from tests.tracking.stored import JOB, artifacts, history, read_run, wait_for

pytestmark = pytest.mark.slow


def test_a_resumed_run_sends_what_a_killed_one_could_not(store: str, tmp_path: Path) -> None:
    """Also the steps between checkpoint and kill, once, though the run comes by them a second time."""
    with Tracker(TrackingConfig(mlflow_uri=store), JOB, True, folder=tmp_path / "first") as begun:
        pass
    killed = Journal(tmp_path)  # the records of a process that was killed before it could send them
    killed.describe(run_id=begun.run_id)
    for step in (10, 20, 30):
        killed.add("metrics", time=step, step=step, values={"loss": 1.0 / step})
    killed.close(remove=False)
    with Tracker(TrackingConfig(mlflow_uri=store), {}, True, folder=tmp_path) as tracker:
        for step in (20, 30, 40):
            tracker.log(step, {"loss": 1.0 / step})
        assert tracker.run_id == begun.run_id
    assert history(store, begun.run_id) == [(step, 1.0 / step) for step in (10, 20, 30, 40)]
    assert read_run(store, begun.run_id).info.status == "FINISHED" and not (tmp_path / JOURNAL).exists()


@pytest.mark.usefixtures("impatient")
def test_a_trial_and_a_resumed_run_start_without_a_server(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Tracker(TrackingConfig(mlflow_uri=store), {}, True) as parent:
        pass
    nowhere = TrackingConfig(mlflow_uri="http://127.0.0.1:9", run_name="trial", parent_run=parent.run_id)
    tags = {"leap.ranks": "1"}
    with pytest.raises(RuntimeError), Tracker(nowhere, JOB, True, tags=tags, folder=tmp_path) as tracker:
        assert tracker.run_id is None
        tracker.log(10, {"loss": 0.1})
        raise RuntimeError
    told = capsys.readouterr().out
    assert "MLflow at http://127.0.0.1:9 cannot be reached: Failed to establish a new connection: " in told
    assert f"; the run continues, its records wait in {tmp_path / JOURNAL}" in told
    assert "MLflow at http://127.0.0.1:9 has not taken 4 records of this run: " in told
    with Tracker(nowhere, JOB, True, tags=tags, folder=tmp_path) as tracker:  # a second try
        tracker.log(20, {"loss": 0.05})
    sync(tmp_path, store)
    from mlflow import MlflowClient

    (run,) = MlflowClient(store).search_runs(["1"], f"tags.`{PARENT}` = '{parent.run_id}'")
    assert (run.info.status, run.info.run_name, run.data.params) == ("FINISHED", "trial", parameters(JOB))
    assert history(store, run.info.run_id) == [(10, 0.1), (20, 0.05)] and run.data.tags["leap.ranks"] == "1"
    with Tracker(nowhere, {}, True, run_id=run.info.run_id) as resumed:
        resumed.log(30, {"loss": 0.0})
    assert "they are lost" in capsys.readouterr().out  # no folder


@pytest.mark.usefixtures("impatient")
def test_a_database_that_is_locked_stops_nothing(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(delivery, "PATIENCE", 0.0)
    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path)}?timeout=0.2"
    with Tracker(TrackingConfig(mlflow_uri=uri), JOB, True, folder=tmp_path / "run") as tracker:
        wait_for(lambda: read_run(uri, tracker.run_id).data.params == parameters(JOB))
        other = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        tracker.log(1, {"loss": 1.0})
    told = capfd.readouterr()
    assert "has not taken 2 records of this run: " in told.out and told.err == ""
    other.close()
    sync(tmp_path / "run", None)
    assert history(uri, tracker.run_id) == [(1, 1.0)]


@pytest.mark.usefixtures("impatient")
def test_an_artifact_that_fails_does_not_hold_up_the_rest(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Tracker(TrackingConfig(mlflow_uri=store), JOB, True, folder=tmp_path) as tracker:
        tracker.artifact(tmp_path / "nowhere")
        tracker.log(1, {"loss": 1.0})
    assert "has not taken 1 records of this run: " in capsys.readouterr().out
    assert history(store, tracker.run_id) == [(1, 1.0)]
    info = read_run(store, tracker.run_id).info
    assert (info.status, info.run_name) == ("FINISHED", tmp_path.name)
    (tmp_path / "nowhere").write_text("here")
    sync(tmp_path, None)
    assert artifacts(store, tracker.run_id) == ["nowhere"]


@pytest.mark.usefixtures("impatient")
def test_a_run_that_was_killed_at_its_very_end_is_completed(store: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    with Tracker(TrackingConfig(mlflow_uri=store), JOB, True, folder=tmp_path / "begun") as begun:
        pass
    journal = Journal(folder)
    journal.describe(uri=store, run_id=begun.run_id, status="RUNNING", experiment="leap", name="run", parent=None)
    journal.add("tags", time=0, values={"late": "yes"})
    journal.close(remove=False)
    told: list[str] = []
    with pytest.raises(UserError, match="has not taken"):
        complete(folder, "http://127.0.0.1:9", told.append)
    assert "its pictures and report.html were missing, and are there now" in told[0] and is_incomplete(folder)
    complete(folder, store, told.append)
    assert "records of run" in told[1] and not is_incomplete(folder) and (folder / "report.html").is_file()
    assert read_run(store, begun.run_id).data.tags["late"] == "yes"


def test_sync_without_anything_to_send_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--sync: got .*; there is no mlflow.jsonl in it: nothing waits"):
        sync(tmp_path, None)
    journal = Journal(tmp_path)
    journal.describe(uri=f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(UserError, match="another process is sending"):
        sync(tmp_path, None)
    journal.close(remove=False)
    with pytest.raises(UserError, match=r"--uri: there is no database .*none.db"):
        sync(tmp_path, None)
    with pytest.raises(UserError, match=r"^MLflow at .* cannot be reached: .* not a .*; name it with --uri"):
        sync(tmp_path, f"sqlite:///{__file__}")


def test_an_address_is_stored_without_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert without_credentials("postgresql://me:pass@host:80/db?password=x") == "postgresql://host:80/db"
    assert without_credentials("sqlite:///mlflow.db?timeout=3") == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert without_credentials("databricks://profile") == "databricks://profile"


def test_a_database_that_cannot_be_written_is_the_users_error(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = store.removeprefix("sqlite:///")
    with (
        pytest.raises(UserError, match=r"tracking: MLflow at .*readonly.*correct tracking\.mlflow_uri"),
        Tracker(TrackingConfig(mlflow_uri=f"sqlite:///file:{file}?mode=ro&uri=true"), JOB, True),
    ):
        pass


def test_jobs_that_start_together_make_one_experiment(store: str) -> None:
    from mlflow import MlflowClient

    run = {"experiment": "together", "name": None, "parent": None}
    with ThreadPoolExecutor(8) as threads:
        ids = set(threads.map(lambda _: begin(MlflowClient(store), store, run), range(8)))
    assert len(ids) == 8 and len({read_run(store, run_id).info.experiment_id for run_id in ids}) == 1


class Heard(http.server.BaseHTTPRequestHandler):
    """A server that notes what it is sent, and takes nothing."""

    requests: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.requests.append(f"{self.path} {dict(self.headers)} {body!r}")
        self.send_error(404)

    do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        """Nothing on the console."""


@pytest.fixture
def stranger() -> Iterator[str]:
    """The address of somebody else's server."""
    Heard.requests.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Heard) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def foreign(folder: Path, uri: str, *paths: str) -> None:
    """A folder that somebody else made."""
    folder.mkdir()
    journal = Journal(folder)
    journal.describe(uri=uri, experiment="x", name="x", parent=None, run_id="0" * 32, status="FINISHED")
    journal.add("tags", values={"a": "b"})
    for path in paths:
        journal.add("artifact", path=path)
    journal.close(remove=False)


@pytest.mark.usefixtures("impatient")
def test_credentials_go_only_where_the_user_says(
    stranger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / ".mlflow").mkdir(parents=True)
    (home / ".mlflow" / "credentials").write_text(
        "[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = p"
    )
    (home / ".netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("HOME", str(home))
    foreign(tmp_path / "run", stranger)
    for name in ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        with pytest.raises(UserError, match=rf"^MLflow at {stranger} has not taken 1 records"):
            sync(tmp_path / "run", None)
        monkeypatch.setenv(name, "of-this-user")
    assert Heard.requests and not any("uthorization" in request for request in Heard.requests)
    with pytest.raises(UserError, match="has not taken"):
        sync(tmp_path / "run", stranger)  # named
    assert "uthorization" in Heard.requests[-1]
    Heard.requests.clear()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stranger)
    with pytest.raises(UserError, match="has not taken"):
        sync(tmp_path / "run", None)  # configured
    assert "uthorization" in Heard.requests[-1]
    foreign(tmp_path / "database", "postgresql://host/db")
    with pytest.raises(UserError, match=r'--sync: the run was recorded at "postgresql://host/db"; .* with --uri'):
        sync(tmp_path / "database", None)


@pytest.mark.parametrize("path", ["/etc/hostname", "../x", "plots/../../x", "link", "folder", "..", "nowhere/../../x"])
def test_nothing_outside_the_folder_is_sent(stranger: str, tmp_path: Path, path: str) -> None:
    foreign(tmp_path / "run", stranger, path)
    (tmp_path / "x").write_text("precious")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "x")
    (tmp_path / "run" / "folder").mkdir()
    (tmp_path / "run" / "folder" / "link").symlink_to(tmp_path / "x")
    (tmp_path / "run" / "plots").mkdir()
    with pytest.raises(UserError, match=r"--sync: .*mlflow.jsonl names .*, which is not in that folder, or is a link"):
        sync(tmp_path / "run", stranger)
    assert not Heard.requests


def test_a_journal_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.jsonl").symlink_to(__file__)
    with pytest.raises(UserError, match=r"mlflow.jsonl is a link"):
        sync(tmp_path, None)


@pytest.mark.parametrize("name", ["\u5b9e" * 33, "x" * 256, "a/b" * 100])
def test_an_experiment_with_a_long_name_has_artifacts(empty_store: Path, tmp_path: Path, name: str) -> None:
    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path)}"
    (tmp_path / "result.json").write_text("{}")
    config = TrackingConfig(mlflow_uri=uri, experiment=name)
    with Tracker(config, JOB, True, folder=tmp_path) as tracker:
        tracker.artifact(tmp_path / "result.json")
    assert artifacts(uri, tracker.run_id) == ["result.json"] and not (tmp_path / JOURNAL).exists()


def test_no_password_is_in_a_table_of_the_store_nor_in_a_file(empty_store: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path)}"
    addresses = {f"a{number}": f"postgresql://user:{text}@host/db" for number, text in enumerate(NASTY)}
    config = {"data": addresses, "list": list(addresses.values())}
    remember_all(config)
    rows = [{"from": address} for address in addresses.values()]
    with Tracker(TrackingConfig(mlflow_uri=uri), config, True, tags=dict(addresses), folder=tmp_path) as tracker:
        tracker.table("table.json", rows)
        tracker.log(1, {"loss": 1.0})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"mlflow.db", "table.json"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert not [text for text in NASTY if text.encode() in content or json.dumps(text)[1:-1].encode() in content], (
            path
        )
