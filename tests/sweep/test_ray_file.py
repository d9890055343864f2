"""Sweep files, and what needs no cluster: combinations, ladders, verdicts, fronts, folders of other sweeps."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from leap_dist.core.phases import Schedule
from leap_dist.errors import UserError
from leap_dist.sweep import run
from leap_dist.sweep.cluster import connected
from leap_dist.sweep.ladder import ladder_of, rung_start
from leap_dist.sweep.run import _check_folder, parse_budget, run_sweep
from leap_dist.sweep.sweep_file import combinations, identity, read_sweep, trials_of
from leap_dist.tracking.journal import Journal
from tests.launch.scripts import load_script
from tests.ranks import RankPools
from tests.sweep.jobs import JOB, run_without_ray, sweep_file

ROOT = Path(__file__).resolve().parents[2]
LADDER: dict[str, Any] = {"mode": "ladder", "vary": {"leap.target": [0.1, 0.7, 0.3]}}


def test_lists_ranges_and_cases_are_combined(tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [{"leap.gates": ["row"], "train.learning_rate": 1e-3}, {"leap.gates": ["head"]}]
    vary: dict[str, Any] = {"leap.target": {"from": 0.1, "to": 0.9, "num": 5}, "train.seed": [1, 2]}
    sweep = read_sweep(sweep_file(tmp_path, vary=vary, cases=cases))
    found = combinations(sweep)
    assert len(found) == 20 and found[0] == {**cases[0], "leap.target": 0.1, "train.seed": 1}
    assert sorted({settings["leap.target"] for settings in found}) == [0.1, 0.3, 0.5, 0.7, 0.9]
    trials = trials_of(sweep)
    assert len({trial.name for trial in trials}) == 20
    assert [trial.config.train.learning_rate for trial in trials] == [1e-3] * 10 + [3e-5] * 10


def test_cases_with_the_same_values_of_other_keys_get_names_of_their_own(tmp_path: Path) -> None:
    trials = trials_of(read_sweep(sweep_file(tmp_path, cases=[{"leap.target": 0.5}, {"train.weight_decay": 0.5}])))
    assert len({trial.name for trial in trials}) == 2


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({}, r"vary: got null and no cases"),
        ({"vary": {"leap.target": []}}, r"vary\.leap\.target: got \[\]; allowed: one or more values"),
        ({"vary": {"leap.targe": [0.5]}}, r"leap\.targe: got 0\.5, unknown key; .*\n  in the trial {"),
        ({"vary": {"leap.target": [0.5, 1.5]}}, r"leap\.target: got 1\.5; allowed"),
        (
            {"vary": {"leap.target": {"from": 0.1, "to": 0.5}}},
            r"vary\.leap\.target: got {\"from\": 0\.1.*allowed: a list of values, {\"from\"",
        ),
        ({"vary": {"leap.target": {"from": 0.1, "to": 0.5, "num": 1}}}, r"allowed for num: an integer from 2"),
        ({"vary": {"leap.target": 0.5}}, r"vary\.leap\.target: got 0\.5; allowed: a list of values"),
        ({"vary": {"leap..target": [0.5]}}, r'vary: got the key "leap\.\.target"; allowed: a dotted key'),
        ({"vary": {"leap.target": [0.5]}, "metric": "bogus_loss"}, r'metric: got "bogus_loss"; allowed: what builtin'),
        (
            {"vary": {"leap.target": {"kind": "uniform", "values": [0.1, 0.5]}}, "search": "random"},
            r"vary\.leap\.target: got {\"kind\".*allowed: a list of values",
        ),
        ({"vary": {"leap.target": [0.5, 0.5]}}, r"vary: the same combination comes twice: {\"leap\.target\": 0\.5}"),
        ({"vary": {"leap.target": [0.5]}, "cases": [{"leap.target": 0.1}]}, r"cases: leap\.target stands in vary too"),
        (
            {"vary": {"leap": [{"target": 0.5}], "leap.target": [0.3]}},
            r'vary: "leap\.target" is a part of "leap", which stands here too; leave one of them out',
        ),
        (
            {"vary": {"train.seed": [1]}, "cases": [{"train": {"max_steps": 20}}]},
            r'vary: "train\.seed" is a part of "train"',
        ),
        ({"vary": {"leap.target": [0.5]}, "samples": 5}, r"samples: got 5; an option of a search: set search, or rem"),
        (
            {"vary": {"train.max_steps": {"uniform": [10, 30]}}, "search": "random"},
            r'vary\.train\.max_steps: got {"uniform": \[10, 30\]}; it takes integers: give a list of them',
        ),
        (
            {"vary": {"train.seed": {"from": 1, "to": 4, "num": 3}}},
            r'train\.seed: got 2\.5; allowed: an integer.*\n  in the trial {"train\.seed": 2\.5}',
        ),
        ({"vary": {"leap.target": [0.5]}, "rank": 2}, r"rank: got 2, unknown key; .*did you mean ranks"),
        (
            {"vary": {"leap.target": [0.5]}, "resources": {"gpus": 0.5}},
            r"resources\.gpus: got 0\.5; allowed: an integer",
        ),
        ({"vary": {"leap.target": [0.5]}, "metric": "f1"}, r"metric: got \"f1\"; allowed: what builtin/clock reports"),
        (
            {"cases": [{"leap.target": 0.5}, {"data.task": "squad", "data.train": "a", "data.validation": "b"}]},
            r"metric: got null; allowed: what all tasks of the sweep report, which is loss; builtin/clock reports "
            r"accuracy, loss; squad reports f1, exact_match, loss",
        ),
        (
            {"vary": {"leap.target": [0.5], "data.seed": [0, 1]}, "search": "optuna"},
            r'search: got "optuna", which compares all trials, and they are judged on builtin/clock \(seed 0\), '
            r'builtin/clock \(seed 1\); allowed: one task and the same validation data in all of them, or "random"',
        ),
        ({"vary": {"leap.target": [0.5]}, "mode": "ladder"}, r"a ladder needs two targets or more"),
        ({"vary": {"train.seed": [1, 2]}, "mode": "ladder"}, r"vary: leap\.target is missing; a ladder walks down"),
        (
            {**LADDER, "cases": [{"leap.measure": "parameters"}]},
            r"leap\.measure: got \"parameters\"; a ladder branches",
        ),
        (
            {"vary": {"train.learning_rate": {"loguniform": [1e-5, 1e-3]}}},
            r'vary\.train\.learning_rate: got .*; it needs search: "random" or "optuna"',
        ),
        ({"vary": {"leap.target": {"choice": []}}, "search": "optuna"}, r"vary\.leap\.target: .*one or more values"),
        ({"vary": {"leap.target": {"uniform": [0.5, 0.5]}}, "search": "random"}, r"target: got .*less than the second"),
        ({"vary": {"leap.target": {"loguniform": [0, 0.5]}}, "search": "random"}, r"target: got .*have to be > 0"),
        ({"search": "random"}, r"vary: got null and no cases"),
        (
            {**LADDER, "cases": [{"leap.mode": "one_shot"}]},
            r"leap\.mode: got \"one_shot\"; a ladder branches off a run",
        ),
        ({**LADDER, "cases": [{"leap.start": "zeros"}]}, r"leap\.start: got \"zeros\"; a ladder branches off a run"),
        ({**LADDER, "cases": [{"leap.weights": "frozen"}]}, r"leap\.weights: got \"frozen\"; a ladder branches off"),
        ({"vary": {"comet.api_key": ["SECRETKEY12345"]}}, r"vary: the values of \"comet.api_key\" hold a secret"),
        (
            {"cases": [{"tracking.mlflow_uri": "http://bob:hunter2pass@mlflow:5000"}]},
            r"vary: the values of \"tracking.mlflow_uri\" hold a secret, and they name trials",
        ),
        (
            {"vary": {"leap.target": [0.5]}, "budget": {"gpu_hours": 1}},
            r"budget\.gpu_hours: got 1; resources\.gpus is 0, so no trial takes any; allowed: hours",
        ),
        ({**LADDER, "search": "random"}, r"search: got \"random\"; a search draws from vary, without cases or ladder"),
        ({"vary": {"leap.target": [0.5]}, "config": "nowhere.json"}, r"config: no file nowhere\.json"),
        ({"varry": {}, "cases": [{}]}, r"varry: got {}, unknown key; .*did you mean .*vary"),
        ({"vary": {}, "search": "optuna"}, r"vary: got {} and no cases; give one of them"),
        ({**LADDER, "early_stop": "asha"}, r"early_stop: got \"asha\"; a ladder needs every rung"),
        ({**LADDER, "cases": [{"train.max_steps": None, "train.epochs": 1}]}, r"train\.max_steps: missing; a ladder"),
    ],
)
def test_a_mistake_is_one_message_before_anything_runs(tmp_path: Path, content: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        run_sweep(sweep_file(tmp_path, **content), str(tmp_path / "out"), None, False, None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "address", "match"),
    [
        (
            {"ranks": 2},
            None,
            r'ranks: got 2, .*; more than one needs Ray; pip install -e "\.\[sweep\]"$',
        ),
        ({"early_stop": "asha"}, None, r'early_stop: got "asha", which needs Ray; pip install .*, or set null'),
        ({}, "auto", r'--address: got "auto", which needs Ray; pip install .*, or leave it out'),
    ],
)
def test_what_needs_ray_says_so_where_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], address: str | None, match: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    file = sweep_file(tmp_path, vary={"leap.target": [0.5]}, **more)
    with pytest.raises(UserError, match=match):
        run_sweep(file, str(tmp_path / "out"), address, False, None)
    assert not (tmp_path / "out").exists()


def test_a_search_that_was_refused_leaves_nothing_that_the_next_one_would_learn_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: RankPools
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    search = {"search": "optuna", "samples": 4, "vary": {"leap.target": [0.5, 0.3]}, "early_stop": "asha"}
    with pytest.raises(UserError, match="early_stop"):
        run_sweep(sweep_file(tmp_path, **search), str(tmp_path / "out"), None, False, None)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "optuna.log").write_text("of another version's refused start\n")
    lengths = {"search": "optuna", "samples": 2, "vary": {"train.max_steps": [12, 14]}}
    file = sweep_file(tmp_path, **lengths)
    assert ranks(1).run(run_without_ray, str(file), str(tmp_path / "out")) == [["done", "done"]]
    told = [json.loads(row) for row in (tmp_path / "out" / "optuna.log").read_text().splitlines()]
    assert [len(row["values"]) for row in told if row.get("values")] == [1, 1]


def test_a_trial_that_was_killed_at_its_very_end_is_completed(
    tmp_path: Path, empty_store: Path, ranks: RankPools
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path)}"
    job = {"tracking": {"mlflow_uri": uri}, "train": {**JOB["train"], "max_steps": 10}}
    file, folder, client = sweep_file(tmp_path, job, vary={"leap.target": [0.5]}), tmp_path / "out", MlflowClient(uri)
    assert ranks(1).run(run_without_ray, str(file), str(folder)) == [["done"]]
    experiment = client.get_experiment_by_name("leap")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.`mlflow.runName` = '0.5'")
    client.update_run(run.info.run_id, status="RUNNING")
    journal = Journal(folder / "0.5")
    about = {"experiment": "leap", "name": "0.5", "parent": None}
    journal.describe(uri=uri, status="RUNNING", run_id=run.info.run_id, **about)
    journal.add("tags", time=0, values={"late": "yes"})
    journal.close(remove=False)
    (folder / "0.5" / "report.html").unlink()
    assert ranks(1).run(run_without_ray, str(file), str(folder)) == [["done"]]
    found = client.get_run(run.info.run_id)
    assert (found.info.status, found.data.tags["late"]) == ("FINISHED", "yes")
    assert (folder / "0.5" / "report.html").is_file() and not (folder / "0.5" / "mlflow.jsonl").exists()


def test_the_job_file_may_lie_beside_the_sweep_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sweeps").mkdir()
    file = sweep_file(tmp_path, vary={"leap.target": [0.5]})
    content = json.loads(file.read_text()) | {"config": "../job.json"}
    (tmp_path / "sweeps" / "one.json").write_text(json.dumps(content))
    monkeypatch.chdir("/")
    assert len(trials_of(read_sweep(tmp_path / "sweeps" / "one.json"))) == 1


@pytest.mark.parametrize("text", ["trials", "trials=0", "days=1", "hours=-1", "gpu_hours=many"])
def test_a_budget_is_a_number_of_something(text: str) -> None:
    with pytest.raises(UserError, match=r"--budget\.\w+: "):
        parse_budget(text)


def test_budgets_are_read(tmp_path: Path) -> None:
    budget = parse_budget("trials=3, hours=0.5")
    assert (budget.trials, budget.hours, budget.gpu_hours) == (3, 0.5, None)
    file = sweep_file(tmp_path, vary={"leap.target": [0.5]})
    with pytest.raises(UserError, match=r"--budget\.gpu_hours: got 2; resources\.gpus is 0"):
        run_sweep(file, str(tmp_path / "out"), None, False, "gpu_hours=2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("address", "match"),
    [
        ("nowhere", 'got "nowhere"; allowed: "auto", host:port, or ray://host:port'),
        ("http://127.0.0.1:80", "allowed: "),
        ("ray://127.0.0.1:{free}", r"nothing answers at ray://127\.0\.0\.1:\d+ .*ray start --head"),
        ("127.0.0.1:{free}", "nothing answers at"),
    ],
)
def test_an_address_that_nothing_answers_at_is_told_at_once(address: str, match: str, quiet_ray: None) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound, but nothing listens
        place = address.format(free=probe.getsockname()[1])
        with pytest.raises(UserError, match=match), connected(place):
            pass


# ------------------------------------------------------------------------------ folders


def test_a_folder_of_another_sweep_is_refused_with_the_difference(tmp_path: Path) -> None:
    file, out = sweep_file(tmp_path, vary={"leap.target": [0.5]}), tmp_path / "out"
    with pytest.raises(UserError, match=r"^--resume: there is no sweep in"):
        run_sweep(file, str(out), None, True, None)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists and holds no sweep; choose another folder"):
        run_sweep(file, str(out), None, False, None)
    sweep = read_sweep(file)
    (out / "sweep.json").write_text(json.dumps({"identity": identity(sweep, trials_of(sweep)) | {"ranks": "2"}}))
    with pytest.raises(UserError, match="another sweep's results") as refusal:
        run_sweep(file, str(out), None, False, None)
    assert str(refusal.value).splitlines()[1:] == ["  ranks is 1 now, and was 2"]


def test_a_sweep_goes_on_with_the_data_that_it_was_started_with_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials that are done would be compared with others that have learned something else."""
    data = tmp_path / "train.tsv"
    data.write_text("sentence\tlabel\ngood\t1\nbad\t0\n")
    job = {"data": {"task": "glue/sst2", "train": str(data), "validation": str(data)}, "model": {"name": "m"}}
    file, out = sweep_file(tmp_path, job, vary={"leap.target": [0.5]}), tmp_path / "out"
    sweep = read_sweep(file)
    out.mkdir()
    before = identity(sweep, trials_of(sweep))
    (out / "sweep.json").write_text(json.dumps({"identity": before}))
    data.write_text("sentence\tlabel\nfine\t1\nbad\t0\n")
    with pytest.raises(UserError, match=r"\n  data\.train \(what its files hold\) is \w+ now, and was \w+"):
        run_sweep(file, str(out), None, False, None)
    data.unlink()  # a machine that only starts the sweep may not have it
    now = identity(sweep, trials_of(sweep))
    assert now == {key: value for key, value in before.items() if "files hold" not in key} != before
    assert _check_folder(out, now, False) == {"identity": before}
    monkeypatch.setattr(run, "_runner", lambda *line: None)
    monkeypatch.setattr(run, "_save", lambda folder, saved: pytest.fail(json.dumps(saved["identity"])))
    with pytest.raises(pytest.fail.Exception) as kept:
        run_sweep(file, str(out), None, False, None)
    assert json.loads(str(kept.value)) == before  # nor does it take the guard from the machines that have it


def test_the_launcher_reports_a_file_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep", "--config", str(tmp_path / "none.json")])
    assert load_script("sweep").main() == 2
    assert "none.json: cannot be read" in capsys.readouterr().err


# ------------------------------------------------------------------------------ ladders


def test_rungs_settle_exactly_where_the_walk_passes_their_target(tmp_path: Path) -> None:
    trials = ladder_of(read_sweep(sweep_file(tmp_path, **LADDER)))
    assert [trial.settings["leap.target"] for trial in trials] == [0.7, 0.3, 0.1]
    *rungs, walk = trials
    assert walk.config.train.max_steps == 40 and sorted(walk.snapshots.values()) == sorted(str(r.branch) for r in rungs)
    schedule = Schedule(40, 0.05, 0.2, 0.1)
    for rung in rungs:
        target, total = rung.config.leap.target, rung.config.train.max_steps or 0
        own = Schedule(total, rung.config.leap.dense_fraction, rung.config.leap.settle_fraction, target)
        start = rung_start(schedule, target)
        assert schedule.level(start) <= target < schedule.level(start - 1)
        assert (own.dense_end, own.settle_start, total - start) == (schedule.dense_end, start, 8)
        assert walk.snapshots[start - 1] == rung.branch


def test_rungs_that_the_walk_passes_at_once_are_runs_of_their_own(tmp_path: Path, ranks: RankPools) -> None:
    job: dict[str, Any] = {"leap": {"target": 0.5, "dense_fraction": 0.0}, "train": {**JOB["train"], "max_steps": 60}}
    file = sweep_file(tmp_path, job, mode="ladder", vary={"leap.target": [0.1, 0.9, 1.0, 0.5]})
    *rungs, walk = ladder_of(read_sweep(file))
    assert [rung.branch is None for rung in rungs] == [True, True, False] and 0 not in walk.snapshots
    assert ranks(1).run(run_without_ray, str(file), str(tmp_path / "out")) == [["done"] * 4]
    for name in ("1.0", "0.9", "0.5", "0.1"):
        certificate = json.loads((tmp_path / "out" / name / "certificate.json").read_text())
        assert abs(certificate["kept"] - float(name) * certificate["prunable"]) <= 1


def test_the_sweeps_in_configs_are_valid() -> None:
    for file in [*(ROOT / "configs").glob("sweep_*.json"), *(ROOT / "configs" / "studies").glob("*.json")]:
        assert trials_of(read_sweep(file))
