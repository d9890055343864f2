"""launch/compare.py as a user starts it: its output streams and its exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from leap_dist.config.sections import TrackingConfig
from leap_dist.tracking.journal import Journal
from leap_dist.tracking.mlflow import Tracker
from tests.launch.scripts import load_script

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "compare.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("compare")


@pytest.fixture(scope="module")
def folder(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as jobs leave it, with two finished runs in its mlflow.db."""
    made: Path = tmp_path_factory.mktemp("jobs")
    shutil.copy(empty_store, made)
    for name, target, accuracy in (("[thin]", 0.1, 0.8), ("thick", 0.5, 0.9)):
        config = {"leap": {"target": target}, "data": {"task": "builtin/clock"}}
        with Tracker(TrackingConfig(mlflow_uri=f"sqlite:///{made}/mlflow.db", run_name=name), config, True) as tracker:
            tracker.log(10, {"pruned_accuracy": accuracy, "dense_accuracy": 0.9, "pruned_density": target})
    return made


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    monkeypatch.chdir(folder)
    store = f"sqlite:///{folder}/mlflow.db"  # by a relative name MLflow would find what another test has opened
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    code: int = script.main()
    return code


def test_help_loads_nothing_heavy() -> None:
    code = "import runpy, sys; sys.argv = ['compare', '--help']\n"
    code += f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    code += "finally: print([name for name in ('mlflow', 'torch', 'rich', 'pydantic') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--best CONDITION" in done.stdout and done.stdout.endswith("[]\n")


def test_answers_and_their_exit_codes(
    script: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(script, monkeypatch, folder) == 0
    printed = capsys.readouterr()
    assert "[thin]" in printed.out and "Pareto front" in printed.out and printed.err == ""
    assert call(script, monkeypatch, folder, "--best", "accuracy>=0.85", "--json", "-") == 0
    assert [line["run"] for line in json.loads(capsys.readouterr().out)] == ["thick"]
    assert call(script, monkeypatch, folder, "--report", "all.html") == 0
    assert capsys.readouterr().err == "report: all.html\n" and "[thin]" in (folder / "all.html").read_text("utf-8")
    assert call(script, monkeypatch, folder, "--diff", "[thin]", "thick") == 0
    assert "leap.target" in capsys.readouterr().out
    assert call(script, monkeypatch, folder, "--diff", "thick", "thick", "--csv", "same.csv") == 0
    assert "have the same parameters" in capsys.readouterr().err
    assert call(script, monkeypatch, folder, "--best", "accuracy>=0.95") == 1
    assert "no run has accuracy >= 0.95; the nearest is 0.9, thick (" in capsys.readouterr().err


def test_a_home_folder_works_in_every_path(script: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert call(script, monkeypatch, folder, "--json=~/all.json", "--csv=~/all.csv") == 0
    assert [line["run"] for line in json.loads((folder / "all.json").read_text())] == ["[thin]", "thick"]
    assert (folder / "all.csv").is_file()


@pytest.mark.parametrize("given", [(), ("--uri", "sqlite:///~/mlflow.db")])
def test_what_a_run_could_not_send_is_sent(
    given: tuple[str, ...],
    script: ModuleType,
    empty_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = f"sqlite:///{shutil.copy(empty_store, tmp_path)}"
    with Tracker(TrackingConfig(mlflow_uri=store), {}, True) as tracker:
        pass
    journal = Journal(tmp_path / "run")
    journal.describe(run_id=tracker.run_id, uri=store, status="FINISHED")
    journal.add("metrics", time=1, step=20, values={"loss": 1.0})
    journal.close(remove=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert call(script, monkeypatch, tmp_path, "--sync", "run", *given) == 0
    assert capsys.readouterr().out == f"MLflow at {store} has taken 1 records of run {tracker.run_id}\n"
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experiment", "laep"], "--experiment: there is no laep; known: leap, Default\n"),
        (["--best", "accuracy~1"], '--best: got "accuracy~1"; allowed: a metric'),
        (["--plot", "a.pdf"], "--plot: got a.pdf; allowed"),
        (["--report", "none/a.html"], "--report: none/a.html cannot be written: No such file"),
        (["--uri", "sqlite:///none.db"], "--uri: there is no database"),
        (["--sync", "."], "--sync: got .; there is no mlflow.jsonl in it: nothing waits there for MLflow"),
    ],
)
def test_a_mistake_is_one_message(
    arguments: list[str],
    message: str,
    script: ModuleType,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(script, monkeypatch, folder, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"error: {message}") and printed.err.count("error: ") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--diff", "thick", "thin", "--plot", "a.png", "--move"], "--diff cannot be combined with --move, --plot"),
        (["--sync", "run", "--masks"], "--sync cannot be combined with --masks; allowed: --uri\n"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    arguments: list[str],
    message: str,
    script: ModuleType,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(script, monkeypatch, folder, *arguments)
    assert stopped.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err
