"""What is next in a sweep, and what early stopping decides: budgets, what is run again, who waits for whom."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leap_dist.errors import UserError
from leap_dist.sweep.early_stop import Judge
from leap_dist.sweep.ladder import ladder_of
from leap_dist.sweep.line import Line
from leap_dist.sweep.optuna_study import STUDY
from leap_dist.sweep.rank import Outcome, Rank, Work
from leap_dist.sweep.result import collect
from leap_dist.sweep.space import corners, drawn
from leap_dist.sweep.storage import Storage
from leap_dist.sweep.sweep_file import SweepConfig, identity, read_sweep, trials_of
from leap_dist.zero.ranks import Ranks
from tests.disks import fill, free
from tests.sweep.jobs import JOB, sweep_file

pytestmark = pytest.mark.slow

SEARCH: dict[str, Any] = {
    "search": "random",
    "samples": 12,
    "vary": {
        "leap.target": [0.5, 0.2],
        "train.learning_rate": {"loguniform": [1e-5, 1e-2]},
        "leap.dense_fraction": {"uniform": [0.05, 0.3]},
        "leap.gates": {"choice": ["row", ["head", "neuron"]]},
    },
}


def line_of(folder: Path, sweep: SweepConfig) -> Line:
    (folder / "out").mkdir(exist_ok=True)
    trials = ladder_of(sweep) if sweep.mode == "ladder" else trials_of(sweep)
    return Line(sweep, trials, Storage(str(folder / "out"), folder), "accuracy")


def run(line: Line, finish: Callable[[Work], Outcome]) -> list[str]:
    """The trials that a call runs, one after another; a finished one leaves its certificate and its snapshots."""
    seen = []
    while (work := line.take("parent")) is not None:
        name = work.output.name
        assert (work.config.tracking.parent_run, work.config.tracking.run_name) == ("parent", name)
        seen.append(name)
        outcome = finish(work)
        if outcome.kind == "done":
            for folder in work.snapshots.values():
                (folder / "step-1").mkdir(parents=True)
            assert work.branch is None or work.branch.is_dir()
            work.output.mkdir()
            target = work.config.leap.target
            content = {"target": target, "density": target, "unit": 1, "kept": 7, "prunable": 14, "gates": [],
                       "tensors": {}, "metrics": {"pruned": {"accuracy": target}}, "masks_sha256": "a" * 64,
                       "weights_sha256": "b" * 64, "seed": 0, "versions": {}}  # fmt: skip
            (work.output / "certificate.json").write_text(json.dumps(content))
        line.end(name, outcome)
    return seen


def done(work: Work) -> Outcome:
    return Outcome("failed", 1.0, "no luck") if work.config.leap.target < 0.05 else Outcome("done", 3600.0)


def test_what_is_finished_is_not_run_again_and_what_failed_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = read_sweep(sweep_file(tmp_path, vary={"leap.target": [0.5, 0.01, 0.3]}))
    line = line_of(tmp_path, sweep)
    assert run(line, done) == ["0.5", "0.01", "0.3"]
    assert {name: outcome.kind for name, outcome in line.ended.items()} == {
        "0.5": "done",
        "0.01": "failed",
        "0.3": "done",
    }
    assert "2/3  0.01  FAILED: no luck  0:01" in capsys.readouterr().out
    with (tmp_path / "out" / "trials.jsonl").open("a") as file:
        file.write('{"trial": "0.5", "ki')  # the driver was killed here
    assert run(line_of(tmp_path, sweep), done) == ["0.01"]


def test_a_trial_that_other_nodes_have_written_elsewhere_failed(tmp_path: Path) -> None:
    line = line_of(tmp_path, read_sweep(sweep_file(tmp_path, vary={"leap.target": [0.5]})))
    assert line.take(None) is not None
    line.end("0.5", Outcome("done", 1.0))
    assert line.ended["0.5"].kind == "failed" and "nodes have to share the output" in line.ended["0.5"].error


@pytest.mark.parametrize(
    ("budget", "num"), [({"trials": 2}, 2), ({"gpu_hours": 5}, 2), ({"hours": 1e-9}, 0), ({"hours": 1.0}, 4)]
)
def test_a_budget_ends_a_call(tmp_path: Path, budget: dict[str, float], num: int) -> None:
    content: dict[str, Any] = {"vary": {"leap.target": [0.9, 0.7, 0.5, 0.3]}, "resources": {"cpus": 1, "gpus": 2}}
    line = line_of(tmp_path, read_sweep(sweep_file(tmp_path, **content, ranks=2, budget=budget)))
    assert len(run(line, done)) == num  # a trial here takes 4 GPU hours


def test_rungs_wait_for_their_walk_and_are_not_run_where_it_failed(tmp_path: Path) -> None:
    sweep = read_sweep(sweep_file(tmp_path, mode="ladder", vary={"leap.target": [0.2, 0.7, 0.4]}))
    line = line_of(tmp_path, sweep)
    walk = line.take(None)
    assert walk is not None and walk.output.name == "0.2"
    assert line.take(None) is None and line.may_come
    line.end("0.2", Outcome("failed"))
    assert line.take(None) is None and not line.may_come
    assert run(line_of(tmp_path, sweep), done) == ["0.2", "0.7", "0.4"]
    assert not (tmp_path / "out" / ".snapshots").exists()


def test_a_stopped_trial_stays_stopped(tmp_path: Path) -> None:
    cases = [{"leap.target": 0.5, "train.seed": seed} for seed in (1, 2, 3)]
    sweep = read_sweep(sweep_file(tmp_path, cases=cases, early_stop="asha"))
    stopped = Outcome("stopped", metrics={"accuracy": 0.9})
    assert run(line_of(tmp_path, sweep), lambda _: stopped) == ["0.5_1", "0.5_2", "0.5_3"]
    again = line_of(tmp_path, sweep)
    assert not again.waiting and again.ended["0.5_2"] == stopped


def test_what_a_full_disk_does_not_take_waits_and_ends_no_sweep(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def finish(work: Work) -> Outcome:
        free(small_disk) if work.config.leap.target == 0.3 else fill(small_disk)
        return done(work)

    sweep = read_sweep(sweep_file(small_disk, vary={"leap.target": [0.01, 0.02, 0.3]}))
    run(line_of(small_disk, sweep), finish)
    assert capsys.readouterr().out.count("trials.jsonl could not be written: No space left on device") == 1
    lines = (small_disk / "out" / "trials.jsonl").read_text().splitlines()
    assert [json.loads(line)["trial"] for line in lines] == ["0.01", "0.02", "0.3"]


# ------------------------------------------------------------------------------ early stopping


class Judged:
    """A sweep with early stopping, and what Tune would tell its scheduler."""

    def __init__(self, folder: Path, kind: str = "asha") -> None:
        cases = [{"leap.target": 0.5, "train.seed": seed} for seed in range(4)] + [{"leap.target": 0.1}]
        self.line = line_of(folder, read_sweep(sweep_file(folder, cases=cases, early_stop=kind)))
        self.judge = Judge(self.line)
        self.configs = {trial.name: trial.config for trial in self.line.trials}

    def __call__(self, name: str, rung: int, accuracy: float) -> str:
        trial = SimpleNamespace(config={"name": name, "work": Work(self.configs[name], Path(name))})
        return self.judge.on_trial_result(None, trial, {"rung": rung, "metrics": json.dumps({"accuracy": accuracy})})


def test_at_each_rung_the_better_half_of_one_target_continues(tmp_path: Path) -> None:
    say = Judged(tmp_path)
    worth = {"0.5_0": 0.8, "0.5_1": 0.7, "0.1": 0.1, "0.5_2": 0.9, "0.5_3": float("nan")}
    said = {name: say(name, 1, value) for name, value in worth.items()}
    assert [name for name, verdict in said.items() if verdict == "STOP"] == ["0.5_1", "0.5_3"]
    assert say("0.5_0", 2, 0.8) == say("0.5_2", 2, 0.9) == say("0.5_0", 4, 0.9) == "CONTINUE"
    assert say("0.5_2", 4, 0.8) == "STOP"
    running = SimpleNamespace(config={"name": "0.5_0"})
    assert say.judge.on_trial_result(None, running, {"step": 3}) == "CONTINUE"  # at no rung


def test_the_median_rule_stops_what_is_worse_than_the_others(tmp_path: Path) -> None:
    say = Judged(tmp_path, "median")
    assert say("0.5_0", 1, 0.8) == say("0.5_1", 1, 0.9) == say("0.1", 1, 0.1) == "CONTINUE"
    assert say("0.5_2", 1, 0.1) == "STOP"


@pytest.mark.parametrize("num_cut", [1, 2, 3])
def test_verdicts_stand_where_a_sweep_is_cut_off(tmp_path: Path, num_cut: int) -> None:
    worth = {"0.5_0": 0.9, "0.5_1": 0.7, "0.5_2": 0.75, "0.5_3": 0.6}
    before, seen = Judged(tmp_path), list(worth.items())
    said = [before(name, 1, accuracy) for name, accuracy in seen[:num_cut]]
    again = Judged(tmp_path)  # after a kill
    said += [again(name, 1, accuracy) for name, accuracy in seen[num_cut:]]
    assert said == ["CONTINUE", "STOP", "STOP", "STOP"]
    assert again("0.5_0", 1, 0.0) == "CONTINUE"  # it resumes from before the rung, and is asked again
    assert len((tmp_path / "out" / "rungs.jsonl").read_text().splitlines()) == 4


# ------------------------------------------------------------------------------ searches


def test_a_random_search_draws_what_vary_allows_and_the_same_every_time(tmp_path: Path) -> None:
    sweep = read_sweep(sweep_file(tmp_path, **SEARCH))
    found = drawn(sweep.vary, 12)
    assert found == drawn(sweep.vary, 12) and len(found) == 12
    assert {settings["leap.target"] for settings in found} == {0.5, 0.2}
    assert all(1e-5 <= settings["train.learning_rate"] <= 1e-2 for settings in found)
    assert min(settings["train.learning_rate"] for settings in found) < 3e-4  # evenly by the logarithm
    assert all(0.05 <= settings["leap.dense_fraction"] <= 0.3 for settings in found)
    assert len({trial.name for trial in trials_of(sweep)}) == 12
    few = read_sweep(sweep_file(tmp_path, search="random", samples=9, vary={"leap.target": [0.5, 0.2]}))
    assert len(drawn(few.vary, 9)) == 2


def test_optuna_resumes_with_what_it_has_learned(tmp_path: Path) -> None:
    sweep = read_sweep(sweep_file(tmp_path, **SEARCH | {"search": "optuna", "samples": 6, "budget": {"trials": 4}}))
    first = run(line_of(tmp_path, sweep), done)
    line = line_of(tmp_path, sweep)
    assert [trial.name for trial in line.trials] == first and line.num_left == 2 and not line.waiting
    cut_off = line.take(None)
    assert cut_off is not None  # and then the kill
    again = line_of(tmp_path, sweep)
    assert [trial.name for trial in again.waiting] == [cut_off.output.name]
    rest = run(again, done)
    assert rest[0] == cut_off.output.name and len({*first, *rest}) == 6
    line = line_of(tmp_path, sweep)
    assert line.num_left == 0 and line.search is not None
    assert line.search.importance().keys() == sweep.vary.keys()


def test_optuna_hears_of_a_trial_that_ended_as_the_sweep_was_killed(tmp_path: Path) -> None:
    sweep = read_sweep(sweep_file(tmp_path, **SEARCH | {"search": "optuna", "samples": 2}))
    line, end = line_of(tmp_path, sweep), Line.end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Line, "end", lambda *_: None)
        run(line, done)
    assert end is Line.end
    again = line_of(tmp_path, sweep)
    assert again.num_left == 0 and again.search is not None
    assert [trial.state.name for trial in again.search._study.trials][:2] == ["COMPLETE"] * 2


def test_optuna_begins_with_every_target(tmp_path: Path) -> None:
    sweep = read_sweep(sweep_file(tmp_path, **SEARCH | {"search": "optuna", "samples": 6}))
    line = line_of(tmp_path, sweep)
    run(line, done)
    targets = [trial.config.leap.target for trial in line.trials]
    assert targets[:4] == [0.5, 0.2, 0.5, 0.2] and len(targets) == 6


def test_a_torn_last_line_of_optunas_file_is_dropped(tmp_path: Path) -> None:
    sweep = read_sweep(sweep_file(tmp_path, **SEARCH | {"search": "optuna", "samples": 4}))
    run(line_of(tmp_path, sweep), done)
    file = tmp_path / "out" / STUDY
    content = file.read_bytes()
    file.write_bytes(content[:-30])
    again = line_of(tmp_path, sweep)
    assert again.num_left == 0 and again.search is not None
    assert [trial.state.name for trial in again.search._study.trials][:4] == ["COMPLETE"] * 4
    assert file.read_bytes().startswith(content[: content[:-30].rfind(b"\n") + 1])
    assert all(json.loads(row) for row in file.read_text().splitlines())


def test_optuna_runs_no_settings_twice(tmp_path: Path) -> None:
    few = {"search": "optuna", "samples": 9, "vary": {"train.learning_rate": [1e-3, 2e-3], "leap.rule": ["leap"]}}
    line = line_of(tmp_path, read_sweep(sweep_file(tmp_path, **few)))
    assert line.total == 2  # there are no more
    assert len(set(run(line, done))) == 2 and len({str(trial.settings) for trial in line.trials}) == 2
    assert line_of(tmp_path, line.sweep).num_left == 0


def test_what_optuna_names_and_is_no_job_is_left_out_and_the_search_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    length = {"train.max_steps": [20, None], "train.epochs": [None, 1.0]}
    job = {"train": {key: value for key, value in JOB["train"].items() if key != "max_steps"}}
    sweep = read_sweep(sweep_file(tmp_path, job, search="optuna", samples=4, vary=length))
    line = line_of(tmp_path, sweep)
    assert len(run(line, done)) == 2 and line.num_left == 0  # two of the four are jobs
    told = capsys.readouterr().out
    assert told.count("left out, as it is no valid job: ") == 2 and "as the sweep file sets it" in told
    assert "the search ends here: Optuna finds no other settings" in told
    assert run(line_of(tmp_path, sweep), done) == []


def test_what_was_learned_or_decided_is_of_one_metric(tmp_path: Path) -> None:
    for more, is_other in (
        (SEARCH | {"search": "optuna"}, True),
        (SEARCH, False),
        (SEARCH | {"early_stop": "asha"}, True),
    ):
        found = []
        for metric in ("accuracy", "loss"):
            sweep = read_sweep(sweep_file(tmp_path, **more, metric=metric))
            found.append(identity(sweep, trials_of(sweep)))
        assert (found[0] != found[1]) == is_other


def test_what_a_long_list_ends_with_makes_another_sweep(tmp_path: Path) -> None:
    """The identity is kept as MLflow's parameters are, which are cut."""
    found = []
    for num in (20, 40, 40):
        job = {
            "leap": {"target": 0.5, "include": [f"encoder.layer.{layer}.output.dense.weight" for layer in range(num)]}
        }
        sweep = read_sweep(sweep_file(tmp_path, job, vary={"train.seed": [1, 2]}))
        found.append(identity(sweep, trials_of(sweep)))
    assert found[0] != found[1] == found[2]


@pytest.mark.parametrize("torn", ["", '{"trial": "c", "ki'])
def test_a_last_line_without_its_end_takes_no_other_with_it(tmp_path: Path, torn: str) -> None:
    sweep = read_sweep(sweep_file(tmp_path, vary={"train.seed": [1, 2, 3]}))
    first, second, third = (trial.name for trial in trials_of(sweep))
    line = line_of(tmp_path, sweep)
    for name in (first, second):
        line._running[name] = line.trials[0]
        line.end(name, Outcome("stopped"))
    file = tmp_path / "out/trials.jsonl"
    file.write_text(file.read_text() + torn if torn else file.read_text().removesuffix("\n"))
    line = line_of(tmp_path, sweep)
    line._running[third] = line.trials[2]
    line.end(third, Outcome("stopped"))
    assert set(line_of(tmp_path, sweep).ended) == {first, second, third}


def test_a_range_of_whole_numbers_has_whole_numbers(tmp_path: Path) -> None:
    ranges = {"train.seed": {"from": 1, "to": 7, "num": 3}, "leap.target": {"from": 0.1, "to": 1, "num": 2}}
    sweep = read_sweep(sweep_file(tmp_path, vary=ranges))
    assert json.dumps(sweep.vary["train.seed"]) == "[1, 4, 7]" and sweep.vary["leap.target"] == (0.1, 1.0)
    assert [trial.config.train.seed for trial in trials_of(sweep)][::2] == [1, 4, 7]


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("trials.jsonl", '{"trial": 3}', r"trials\.jsonl:1: damaged: trial: Input should be a valid string; remove"),
        ("rungs.jsonl", '{"trial": "a"}', r"rungs\.jsonl:1: damaged: rung: Field required; remove the line"),
        ("trials.jsonl", "[]", r"trials\.jsonl:1: damaged: the line: Input should be a valid dict"),
    ],
)
def test_a_line_that_is_damaged_is_named(tmp_path: Path, file: str, text: str, match: str) -> None:
    sweep = read_sweep(sweep_file(tmp_path, vary={"leap.target": [0.5]}))
    line_of(tmp_path, sweep)
    (tmp_path / "out" / file).write_text(f"{text}\n")
    with pytest.raises(UserError, match=match) as caught:
        line_of(tmp_path, sweep)
    assert "pydantic" not in str(caught.value)


def test_a_certificate_without_content_is_damaged(tmp_path: Path) -> None:
    sweep = read_sweep(sweep_file(tmp_path, vary={"leap.target": [0.5]}))
    (tmp_path / "0.5").mkdir()
    (tmp_path / "0.5" / "certificate.json").write_text("{}")
    with pytest.raises(UserError, match=r"certificate\.json: damaged"):
        collect(sweep, trials_of(sweep), {}, tmp_path, "accuracy")


def test_a_study_that_is_damaged_is_reported(tmp_path: Path) -> None:
    sweep = read_sweep(sweep_file(tmp_path, **SEARCH | {"search": "optuna"}))
    line_of(tmp_path, sweep)
    (tmp_path / "out" / "optuna.log").write_text('{"op_code": "x"}\n')
    with pytest.raises(UserError, match=r"--output: .*optuna\.log cannot be read: .*restore it, or choose another"):
        line_of(tmp_path, sweep)


def test_what_a_search_could_draw_is_checked_before_it_begins(tmp_path: Path) -> None:
    vary = {"leap.target": [0.5, 0.2], "leap.dense_fraction": {"uniform": [-1, 0.3]}}
    sweep = read_sweep(sweep_file(tmp_path, search="optuna", vary=vary))
    assert corners(sweep.vary)[1] == {"leap.target": 0.2, "leap.dense_fraction": 0.3}
    with pytest.raises(UserError, match=r"leap\.dense_fraction: got -1.*\n  in the trial"):
        trials_of(sweep)


def test_optuna_that_is_not_there_is_the_users_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "optuna"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    sweep = read_sweep(sweep_file(tmp_path, **SEARCH | {"search": "optuna"}))
    with pytest.raises(UserError, match=r'search: Optuna is not installed; pip install -e "\.\[search\]", or set'):
        trials_of(sweep)


def test_a_rank_tells_how_far_it_is_and_needs_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "DO_NOT_TRACK", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "1")
    rank = Rank(1.0, 0)
    rank._notify(5, 10, {"loss": 0.5})
    assert (rank.state().step, rank.state().total) == (5, 10)
    with pytest.raises(ValueError, match=r"has no folder .*nowhere: a sweep needs one that all nodes share"):
        rank.join(tmp_path / "nowhere")


class Faulty(Rank):
    """A rank whose trial fails as libraries do that quote what they were given."""

    def _run(self, work: Work) -> None:
        given = work.config.deepspeed["comet"]["api_key"]
        raise RuntimeError(f"cannot reach https://me:hunter2secret@host/x?token=abcdefgh with {given}{' or' * 99}")


def test_what_a_failed_trial_leaves_holds_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "DO_NOT_TRACK", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "1")
    job: dict[str, Any] = {"comet": {"enabled": False, "api_key": "key-of-comet-zq"}}
    sweep = read_sweep(sweep_file(tmp_path, job, vary={"leap.target": [0.5]}))
    line = line_of(tmp_path, sweep)
    monkeypatch.setattr("leap_dist.secrets._remembered", {})  # as in a process of Ray's, which has read no job file
    rank = Faulty(1.0, 0)
    rank._ranks = Ranks(0, 1, torch.device("cpu"))
    run(line, rank.run)
    said = "RuntimeError: cannot reach https://***@host/x?token=*** with ***"
    assert line.ended["0.5"].error.startswith(said) and len(line.ended["0.5"].error) == 300
    left = {path.name: path.read_text() for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert {name for name, text in left.items() if said in text} == {"0.5.log", "trials.jsonl"}
    whole = capsys.readouterr().out + "".join(left.values())
    assert not any(secret in whole for secret in ("hunter2secret", "abcdefgh", "comet-zq"))
