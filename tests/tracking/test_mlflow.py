"""The tracker against real stores: a sqlite file, and a server in a process of its own, behind a proxy where it fails.

What a killed job leaves behind is shown with real jobs and a server that is killed, in tests/bench/tracking_server.py.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from leap_dist.config.sections import DataConfig, TrackingConfig
from leap_dist.errors import UserError
from leap_dist.run_folder import JOURNAL
from leap_dist.tracking import system
from leap_dist.tracking.delivery import MAX_BATCH
from leap_dist.tracking.mlflow import Tracker, parameters, sync
from leap_dist.tracking.runs import Selection, read_runs
from tests.tracking.proxy import Proxy, proxy
from tests.tracking.servers import DATABASE, Server
from tests.tracking.stored import JOB, artifacts, history, read_run, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[str]:
    """The address of a real `mlflow server` with a sqlite backend."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, folder / DATABASE)
    with Server(folder) as running:
        yield running.address


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
    config |= {"text": "x" * 9000, "k" * 300: 1, "a*b": 2, "as long": "y" * 500}
    with Tracker(TrackingConfig(mlflow_uri=store), config, True) as tracker:
        pass
    params = read_run(store, tracker.run_id).data.params
    assert len(params) == 2 * MAX_BATCH + 5
    assert params["deep.key200"] == "200"
    assert params["text"].startswith("x" * 400) and len(params["text"]) == 500 and params["as long"] == "y" * 500
    assert params["text"] != parameters({"text": "x" * 9001})["text"]  # a digest tells texts apart that begin alike
    assert params["k" * 250] == "1" and params["a_b"] == "2"
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
        pytest.raises(UserError, match=r"tracking: MLflow at .*correct .*tracking\.experiment"),
        Tracker(TrackingConfig(mlflow_uri=store, experiment="gone"), JOB, True),
    ):
        pass


# ---------------------------------------------------------------------------------------------- stores that fail


@pytest.fixture
def relay(server: str) -> Iterator[Proxy]:
    """A proxy in front of the server."""
    with proxy(int(server.rsplit(":", 1)[1])) as made:
        yield made


@pytest.mark.usefixtures("impatient")
def test_a_server_that_fails_loses_nothing_and_has_nothing_twice(
    server: str, relay: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"http://me:secret@{relay.address}"
    (tmp_path / "result.json").write_text("{}")
    with Tracker(TrackingConfig(mlflow_uri=uri), JOB, True, tags={"leap.ranks": "1"}, folder=tmp_path) as tracker:
        tracker.log(1, {"loss": 1.0, "gap": float("inf")})
        wait_for(lambda: history(server, tracker.run_id) == [(1, 1.0)])
        relay.mode = "deaf"  # what is sent arrives, but nobody learns of it
        tracker.log(2, {"loss": 0.5, "gap": float("nan")})
        wait_for(lambda: relay.lost > 0 and len(history(server, tracker.run_id)) == 2)
        relay.mode = "down"
        tracker.log(3, {"loss": 0.25})
        tracker.artifact(tmp_path / "result.json")
    told = capsys.readouterr()
    assert told.err == "" and told.out.startswith(f"MLflow at http://***@{relay.address} has not taken ")
    assert told.out.count("\n") == 1
    assert f"they wait in {tmp_path / JOURNAL}; to send them: python launch/compare.py --sync {tmp_path}" in told.out
    assert "secret" not in (tmp_path / JOURNAL).read_text()
    with pytest.raises(UserError, match=rf"^MLflow at http://{relay.address} has not taken \d records: .*try again"):
        sync(tmp_path, None)
    relay.mode = "open"
    assert sync(tmp_path, uri).endswith(f"of run {tracker.run_id}")
    assert history(server, tracker.run_id) == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert len(history(server, tracker.run_id, "gap")) == 2
    run = read_run(server, tracker.run_id)
    assert (run.info.status, run.data.params, run.data.tags["leap.ranks"]) == ("FINISHED", parameters(JOB), "1")
    assert artifacts(server, tracker.run_id) == ["result.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_server_that_wants_credentials_is_the_users_error(relay: Proxy, tmp_path: Path) -> None:
    relay.mode = "locked"
    with (
        pytest.raises(UserError, match=r"401.*; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        Tracker(TrackingConfig(mlflow_uri=f"http://{relay.address}", parent_run="p"), JOB, True, folder=tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())
    uri = f"http://me:secret@{relay.address}"
    config = {"tracking": {"mlflow_uri": uri}}
    with Tracker(TrackingConfig(mlflow_uri=uri), config, True, folder=tmp_path) as tracker:
        pass
    assert read_run(uri, tracker.run_id).data.params == {"tracking.mlflow_uri": f"http://***@{relay.address}"}


# ---------------------------------------------------------------------------------------------- what a run holds


def test_data_table_and_system_metrics(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    from leap_dist.tasks.builtin import load

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)  # load_table reads the store of the process
    monkeypatch.setattr(system, "EVERY", 0.0)
    data = DataConfig(task="builtin/clock")
    task = load(data)
    rows = [{"granularity": "head", "tensors": ["q", "k"], "kept": 3}, {"granularity": "row", "kept": 4, "which": 1}]
    for _ in range(2):  # the data is the same, and there once
        with Tracker(TrackingConfig(mlflow_uri=store, experiment="data"), JOB, True, folder=tmp_path) as tracker:
            tracker.datasets(data, task)
            tracker.table("gates.json", rows)
            tracker.log(1, {"loss": 1.0})
            tracker.log(2, {"loss": 0.5})
    run, client = read_run(store, tracker.run_id), MlflowClient(store)
    found = {item.dataset.name: (item.tags[0].value, item.dataset) for item in run.inputs.dataset_inputs}
    assert found.keys() == {"builtin/clock train", "builtin/clock validation"}
    context, train = found["builtin/clock train"]
    assert context == "train" and json.loads(train.profile) == {"num_rows": len(task.train)}
    assert train.source_type == "code" and json.loads(train.source)["tags"] == {"task": "builtin/clock", "seed": "0"}
    assert {len(dataset.digest) for _, dataset in found.values()} == {32}
    assert train.digest != found["builtin/clock validation"][1].digest
    assert [stored.data for stored in read_runs(store, Selection(["data"]))] == ["builtin/clock 0"] * 2
    table = client.load_table(run.info.experiment_id, "gates.json", [run.info.run_id])
    assert table["tensors"].tolist()[0] == "q, k" and table["kept"].tolist() == [3, 4]
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= run.data.metrics.keys()
    assert [step for step, _ in history(store, run.info.run_id, "system/disk_usage_percentage")] == [2]
