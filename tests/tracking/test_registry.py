"""Models in MLflow: what a real run records, versions and aliases, and answers of `mlflow models serve`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

from leap_dist.config.sections import TrackingConfig
from leap_dist.errors import UserError
from leap_dist.tracking.compare import Request, best, parse_condition, rows_of
from leap_dist.tracking.mlflow import Tracker
from leap_dist.tracking.registering import parse_place, register_best
from leap_dist.tracking.runs import Selection, read_runs
from tests.export.runs import classifier, make_run
from tests.launch.test_prune import run_in_rank
from tests.ranks import RankPools
from tests.sweep.jobs import JOB

pytestmark = pytest.mark.slow

IDS = torch.arange(14).view(2, 7) % 32


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, empty_store: Path, ranks: RankPools) -> tuple[str, Path]:
    """A store with two real runs, and the folder of their folders; the first run asks for a version of "clock"."""
    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{shutil.copy(empty_store, folder)}"
    for target, register in ((0.5, "clock"), (0.3, None)):
        job = {"train": {**JOB["train"], "max_steps": 10, "checkpoint_every": 3}, "leap": {"target": target}}
        tracking = {"mlflow_uri": uri, "register": register}
        told = ranks(1).run(run_in_rank, JOB | job | {"tracking": tracking}, str(folder / str(target)))
        assert told == [""]
    return uri, folder


def test_a_finished_run_has_a_model_with_its_metrics_and_a_version(runs: tuple[str, Path]) -> None:
    uri, folder = runs
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("leap")
    assert experiment is not None
    query = "metrics.pruned_accuracy >= 0 and metrics.dense_accuracy >= 0 and params.`leap.target` = '0.5'"
    (model,) = client.search_logged_models([experiment.experiment_id], query)
    certificate = json.loads((folder / "0.5" / "certificate.json").read_text())
    tags = {f"leap.{key}": str(certificate[key]) for key in ("target", "density", "masks_sha256")}
    assert str(model.status) == "READY" and {key: model.tags[key] for key in tags} == tags
    linked = {(metric.key, metric.step): metric.value for metric in model.metrics or ()}
    assert linked["pruned_accuracy", 10] == certificate["metrics"]["pruned"]["accuracy"]
    assert linked["dense_accuracy", 10] == certificate["metrics"]["dense"]["accuracy"]
    assert {step for key, step in linked if key == "loss"} == {3, 6, 9}  # its checkpoints
    run = client.get_run(model.source_run_id)
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in history] == list(range(1, 11))  # linked, and not there twice
    (version,) = client.search_model_versions("name = 'clock'")
    assert (version.run_id, version.version) == (run.info.run_id, 1) and version.tags == tags
    assert version.source == model.artifact_location


def test_the_model_of_a_run_that_breaks_is_marked_and_ready_once_it_has_finished(
    tmp_path: Path, empty_store: Path
) -> None:
    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path)}"
    tracking, client = TrackingConfig(mlflow_uri=uri, experiment="broken"), MlflowClient(uri)
    with pytest.raises(RuntimeError), Tracker(tracking, {}, True) as tracker:
        tracker.log(1, {"loss": 1.0})
        tracker.checkpoint()
        raise RuntimeError
    experiment = client.get_experiment_by_name("broken")
    assert experiment is not None
    (model,) = client.search_logged_models([experiment.experiment_id])
    assert str(model.status) == "FAILED"
    with Tracker(tracking, {}, True, tracker.run_id) as again:
        again.model(tmp_path, 2)
    (model,) = client.search_logged_models([experiment.experiment_id])
    assert str(model.status) == "READY"


def test_the_best_run_gets_an_alias_that_no_other_loses_unasked(runs: tuple[str, Path]) -> None:
    uri, _ = runs
    small, large = rows_of(read_runs(uri, Selection()), "loss")
    place, client = parse_place("clock@champion"), MlflowClient(uri)
    line = register_best(uri, large, place, move=False)
    assert line.endswith("is version 1 of clock, alias champion: models:/clock@champion")
    with pytest.raises(
        UserError, match=r"^--register: the alias champion of clock is version 1's \(run \w{8}\); .*--move"
    ):
        register_best(uri, small, place, move=False)
    assert len(client.search_model_versions("name = 'clock'")) == 1  # nothing half done
    found = best([small, large], parse_condition("loss<=100"))
    assert found is small
    line = register_best(uri, small, place, move=True)
    assert "is version 2 of clock, alias champion, which was that of version 1: " in line
    assert client.get_model_version_by_alias("clock", "champion").run_id == small.run.id
    assert register_best(uri, small, parse_place("clock"), move=False).endswith("is version 2 of clock")


def test_a_model_that_is_nowhere_is_not_registered(store: str) -> None:
    ending = {"pruned_loss": 0.1, "dense_loss": 0.1, "pruned_density": 0.5}
    config = {"leap": {"target": 0.5}}
    with Tracker(TrackingConfig(mlflow_uri=store), config, True, tags={"leap.folder": "/nowhere"}) as tracker:
        tracker.log(1, ending)
    (row,) = rows_of(read_runs(store, Selection()), "loss")
    with pytest.raises(UserError, match=r"has no model in the store, and its folder /nowhere is not here; train it"):
        register_best(store, row, parse_place("m"), move=False)


def test_a_model_whose_files_never_came_is_copied_from_the_folder_or_refused(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run had made its model in the store at a checkpoint, and could not send its files at the end."""
    import mlflow

    store = f"sqlite:///{shutil.copy(empty_store, tmp_path)}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    tracking, place = TrackingConfig(mlflow_uri=store, log_model=True), parse_place("m@champion")
    config = {"leap": {"target": 0.5}}
    with Tracker(tracking, config, True, tags={"leap.folder": str(tmp_path / "run")}) as tracker:
        tracker.log(1, {"pruned_loss": 0.1, "dense_loss": 0.1, "pruned_density": 0.5})
        tracker.checkpoint()
    (row,) = rows_of(read_runs(store, Selection()), "loss")
    client = MlflowClient(store)
    with pytest.raises(UserError, match=r"has no model in the store, and its folder .*run is not here"):
        register_best(store, row, place, move=False)
    assert not client.search_model_versions("name = 'm'")
    make_run(tmp_path / "run", classifier(), {})
    assert "is version 1 of m" in register_best(store, row, place, move=False)
    answer = mlflow.pyfunc.load_model("models:/m@champion").predict(pd.DataFrame({"input_ids": IDS.tolist()}))
    assert answer.shape == (2, 3)
    experiment = client.get_experiment_by_name("leap")
    assert experiment is not None
    (model,) = client.search_logged_models([experiment.experiment_id])
    assert str(model.status) == "READY" and model.tags["leap.density"] == "0.5"


def test_a_store_without_a_registry_is_refused_before_the_run_begins(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "nonsense://x")
    tracking = TrackingConfig(mlflow_uri=store, experiment="none", register="m")
    with (
        pytest.raises(UserError, match=r"^tracking\.register: got m; the store has no registry.*set this key to null"),
        Tracker(tracking, {}, True),
    ):
        pass
    assert MlflowClient(store).get_experiment_by_name("none") is None


@pytest.mark.parametrize("text", ["a/b", "a:b", "", "a@latest", "a@v3", "a@", "@b", "it's"])
def test_names_that_mlflow_does_not_take_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--register: got .*allowed: NAME or NAME@ALIAS"):
        Request(best="loss<1", register=text)


@pytest.mark.parametrize(
    ("given", "match"),
    [({"register": "m"}, "--register: needs --best"), ({"best": "loss<1", "move": True}, "--move: needs --register")],
)
def test_options_that_need_another(given: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        Request(**given)


# ---------------------------------------------------------------------------------------------- served


@contextlib.contextmanager
def serving(model: str, uri: str, folder: Path) -> Iterator[str]:
    """`mlflow models serve`; the address. Its processes are in a session of their own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        model,
        "-p",
        str(port),
        "--env-manager",
        "local",
    ]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "MLFLOW_TRACKING_URI": uri}
    with (folder / f"{port}.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answer(address: str, table: dict[str, list[Any]]) -> Any:
    """What a served model says of a table, when it is up."""
    body = json.dumps({"dataframe_split": {"columns": list(table), "data": list(zip(*table.values(), strict=True))}})
    request = urllib.request.Request(f"{address}/invocations", body.encode(), {"Content-Type": "application/json"})
    opener, deadline = urllib.request.build_opener(urllib.request.ProxyHandler({})), time.monotonic() + 120
    while True:
        try:
            with opener.open(request, timeout=60) as reply:
                return json.load(reply)["predictions"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.5)


@pytest.mark.long
def test_both_flavours_are_served(runs: tuple[str, Path], tmp_path: Path) -> None:
    from transformers import BertTokenizer

    from leap_dist.export.hf import load_exported

    uri, folder = runs
    model: Any = classifier(num_labels=2)
    model.save_pretrained(tmp_path / "text")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "text")
    with Tracker(TrackingConfig(mlflow_uri=uri, experiment="text", register="text"), {}, True) as tracker:
        tracker.model(tmp_path / "text")
    with (
        serving("models:/clock/1", uri, tmp_path) as clock,
        serving("models:/text/1", uri, tmp_path) as text,
        torch.inference_mode(),
    ):
        expected: Any = load_exported(folder / "0.5" / "model")(input_ids=IDS)
        logits = answer(clock, {"input_ids": IDS.tolist()})
        np.testing.assert_allclose(logits, expected.logits.numpy(), rtol=1e-5, atol=1e-6)
        chances = model(**tokenizer(["good film"], return_tensors="pt")).logits.softmax(-1)
        (found,) = answer(text, {"text": ["good film"]})
        assert found["label"] == model.config.id2label[int(chances.argmax())]
        assert found["score"] == pytest.approx(float(chances.amax()), rel=1e-5)
