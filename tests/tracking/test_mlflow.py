"""The tracker against real stores: a sqlite file, and a server in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from leap_dist.config import TrackingConfig
from leap_dist.errors import UserError
from leap_dist.tracking.mlflow import MAX_BATCH, Tracker, hide_password, parameters

JOB = {"train_batch_size": 4, "leap": {"target": 0.1, "gates": ["row", "block:4x4"]}, "empty": {}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of one sqlite store for all tests of this file; making the tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('a store') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real `mlflow server` with a sqlite backend."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", "sqlite:///backend.db"]
    command += ["--artifacts-destination", "files"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own session: the server and its workers
        process.wait()


def _wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), opener.open(address, timeout=5):
            return
        time.sleep(0.2)
    pytest.fail(f"the MLflow server did not come up:\n{log.read_text()}")


def read_run(uri: str, run_id: str | None):  # type: ignore[no-untyped-def]  # mlflow is not imported up here
    from mlflow import MlflowClient

    assert run_id is not None
    return MlflowClient(tracking_uri=uri).get_run(run_id)


def artifacts(uri: str, run_id: str | None, folder: str | None = None) -> list[str]:
    from mlflow import MlflowClient

    assert run_id is not None
    return [item.path for item in MlflowClient(tracking_uri=uri).list_artifacts(run_id, folder)]


def track_one_run(uri: str, tmp_path: Path) -> str:
    """A run with everything in it; its id."""
    (tmp_path / "certificate.json").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with Tracker(TrackingConfig(mlflow_uri=uri, experiment="a/b c", run_name="first"), JOB, True) as tracker:
        tracker.log(1, {"loss": 0.7, "R": 1.0})
        tracker.log(2, {"loss": 0.5, "gap": float("nan")})
        tracker.artifact(tmp_path / "certificate.json")
        tracker.artifact(tmp_path / "model")
        assert read_run(uri, tracker.run_id).info.status == "RUNNING"
    assert tracker.run_id is not None
    return tracker.run_id


def check_one_run(uri: str, run_id: str) -> None:
    from mlflow import MlflowClient

    run = read_run(uri, run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert run.info.end_time >= run.info.start_time
    assert run.data.params == {
        "train_batch_size": "4",
        "leap.target": "0.1",
        "leap.gates": "['row', 'block:4x4']",
        "empty": "{}",
    }
    history = MlflowClient(tracking_uri=uri).get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 0.7), (2, 0.5)]
    assert artifacts(uri, run_id) == ["certificate.json", "model"]
    assert artifacts(uri, run_id, "model") == ["model/config.json"]


def test_sqlite_holds_the_run_and_artifacts_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = "sqlite:///new/mlflow.db"  # relative, in a folder that is not there yet
    run_id = track_one_run(uri, tmp_path)
    assert capfd.readouterr() == ("", "")
    check_one_run(uri, run_id)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["mlflow.db", "mlruns"]
    assert len(list((tmp_path / "new" / "mlruns").rglob("certificate.json"))) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"new", "certificate.json", "model"}


def test_server_holds_the_run(server: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_id = track_one_run(server, tmp_path)
    assert capfd.readouterr() == ("", "")
    check_one_run(server, run_id)


def test_resumed_run_goes_on(store: str) -> None:
    tracking = TrackingConfig(mlflow_uri=store)
    with Tracker(tracking, JOB, True) as first:
        first.log(1, {"loss": 1.0})
    tags = {"leap.ranks": "2"}
    with Tracker(tracking, {"leap": {"target": 0.9}}, True, run_id=first.run_id, tags=tags) as second:
        second.log(2, {"loss": 0.5})
        assert read_run(store, second.run_id).info.status == "RUNNING"
    run = read_run(store, first.run_id)
    assert second.run_id == first.run_id
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 0.5})
    assert run.data.params == parameters(JOB) and run.data.tags["leap.ranks"] == "2"


def test_an_address_is_shown_without_its_password() -> None:
    text = "http://me:secret@host:80/x and postgresql://you:p%40ss@host/db?a=b"
    assert hide_password(text) == "http://***@host:80/x and postgresql://***@host/db?a=b"
    assert hide_password("sqlite:///a@b.db") == "sqlite:///a@b.db"


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_run_that_breaks_is_told_apart(store: str, error: type[BaseException], status: str) -> None:
    tracker = Tracker(TrackingConfig(mlflow_uri=store), JOB, True)
    with pytest.raises(error), tracker:
        raise error
    assert read_run(store, tracker.run_id).info.status == status


def test_first_finish_counts(store: str) -> None:
    with Tracker(TrackingConfig(mlflow_uri=store), {}, True) as tracker:
        tracker.finish("KILLED")
        tracker.log(1, {"loss": 1.0})
    run = read_run(store, tracker.run_id)
    assert (run.info.status, run.data.metrics) == ("KILLED", {})


def test_many_and_long_parameters(store: str) -> None:
    config = {"deep": {f"key{i}": i for i in range(2 * MAX_BATCH + 1)}}
    config |= {"text": "x" * 9000, "k" * 300: 1, "a*b": 2}
    with Tracker(TrackingConfig(mlflow_uri=store), config, True) as tracker:
        pass
    params = read_run(store, tracker.run_id).data.params
    assert len(params) == 2 * MAX_BATCH + 4
    assert params["deep.key200"] == "200"
    assert params["text"] == "x" * 500 and params["k" * 250] == "1" and params["a_b"] == "2"
    assert params == parameters(config)


@pytest.mark.parametrize(("uri", "enabled"), [(None, True), ("sqlite:///mlflow.db", False)])
def test_disabled_tracker_does_nothing(
    uri: str | None, enabled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Tracker(TrackingConfig(mlflow_uri=uri), JOB, enabled) as tracker:
        tracker.log(1, {"loss": 1.0})
        tracker.artifact(tmp_path / "nowhere")
    assert tracker.run_id is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("http://127.0.0.1:9", "refused"),
        ("nonsense://x", "unsupported URI 'nonsense://x'"),
        ("sqlite:////proc/no.db", "unable to open database file"),
        ("sqlite:///{folder}/text.db", "file is not a database"),
    ],
)
def test_store_that_does_not_work_is_the_users_error(uri: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database, but long enough to look like a file with a header")
    started = time.monotonic()
    uri = uri.format(folder=tmp_path)
    with (
        pytest.raises(UserError, match=rf"^tracking: MLflow at .*{why}.*set tracking\.mlflow_uri to null"),
        Tracker(TrackingConfig(mlflow_uri=uri), JOB, True),
    ):
        pass
    assert time.monotonic() - started < 20


def test_unknown_run_is_the_users_error(store: str) -> None:
    tracker = Tracker(TrackingConfig(mlflow_uri=store), JOB, True, run_id="0" * 32)
    with pytest.raises(UserError, match=r"tracking: MLflow at .*0000.* not found"), tracker:
        pass


def test_deleted_experiment_is_the_users_error(store: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    client.delete_experiment(client.create_experiment("gone"))
    with (
        pytest.raises(UserError, match=r"tracking: MLflow at .*mend .*tracking\.experiment"),
        Tracker(TrackingConfig(mlflow_uri=store, experiment="gone"), JOB, True),
    ):
        pass
