"""What is next in a sweep, and what early stopping decides: budgets, what is run again, who waits for whom."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leap_dist.errors import UserError
from leap_dist.sweep.early_stop import Judge
from leap_dist.sweep.line import Line
from leap_dist.sweep.rank import Outcome, Rank, Work
from leap_dist.sweep.result import collect
from leap_dist.sweep.sweep_file import identity, read_sweep, trials_of
from leap_dist.zero.ranks import Ranks
from tests.disks import fill, free
from tests.sweep.jobs import sweep_file
from tests.sweep.lines import done, line_of, run

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize("kinds", ["done stopped", "done failed"])
def test_what_no_later_call_needs_is_removed(tmp_path: Path, kinds: str) -> None:
    cases = [{"leap.target": 0.5, "train.seed": 1}, {"leap.target": 0.5, "train.seed": 2}]
    sweep = read_sweep(sweep_file(tmp_path, cases=cases, early_stop="asha"))
    ends = iter(kinds.split())

    def finish(work: Work) -> Outcome:
        kind: Any = next(ends)
        if kind != "done":
            (work.output / "checkpoints" / "step-1").mkdir(parents=True)
        (tmp_path / "out" / ".dense_reference").mkdir(exist_ok=True)
        return Outcome(kind, 1.0)

    run(line_of(tmp_path, sweep), finish)
    needed = "failed" in kinds  # the next call runs it again
    assert (tmp_path / "out" / "0.5_2" / "checkpoints").exists() == needed
    assert (tmp_path / "out" / ".dense_reference").exists() == needed


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

    def __init__(self, folder: Path, kind: str = "asha", line: Line | None = None) -> None:
        cases = [{"leap.target": 0.5, "train.seed": seed} for seed in range(4)] + [{"leap.target": 0.1}]
        self.line = line or line_of(folder, read_sweep(sweep_file(folder, cases=cases, early_stop=kind)))
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


def test_trials_that_are_judged_on_other_data_are_not_compared(tmp_path: Path) -> None:
    cases = [{"leap.target": 0.5, "data.seed": data, "train.seed": seed} for data in (0, 1) for seed in (0, 1)]
    sweep = read_sweep(sweep_file(tmp_path, cases=cases, early_stop="asha"))
    say = Judged(tmp_path, line=line_of(tmp_path, sweep))
    assert say("0.5_0_0", 1, 0.9) == say("0.5_1_0", 1, 0.3) == "CONTINUE"
    again = Judged(tmp_path, line=line_of(tmp_path, sweep))  # after a kill
    assert again("0.5_0_1", 1, 0.8) == again("0.5_1_1", 1, 0.2) == "STOP"


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


# ------------------------------------------------------------------------------ files, ranks


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
