"""The order of a sweep's trials, with slots that only pretend: budgets, what is run again, who waits for whom."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leap_dist.sweep import slot
from leap_dist.sweep.ladder import ladder_of
from leap_dist.sweep.rank import Outcome, Rank, State, Work
from leap_dist.sweep.ray_sweep import RaySweep
from leap_dist.sweep.storage import Storage
from leap_dist.sweep.sweep_file import BudgetConfig, SweepConfig, read_sweep, trials_of
from tests.disks import fill, free
from tests.sweep.jobs import sweep_file

pytestmark = pytest.mark.slow

SEEN: list[str] = []


class Pretender:
    """Leaves what a slot would leave; a target below 0.05 fails, one below 0.1 is stopped."""

    accuracy: Callable[[str], float] | None = None

    def __init__(self, *_: Any) -> None:
        pass

    def run(self, work: Work, watched: Callable[[State], bool | None], lost: Callable[[str], None]) -> Outcome:
        SEEN.append(work.output.name)
        lost("a rank is gone")
        if work.config.leap.target < 0.05:
            return Outcome("failed", 1.0, "no luck")
        if work.asked and watched(State(1, 2, {"accuracy": self._accuracy(work)})) is False:
            return Outcome("stopped", 1.0, metrics={"accuracy": 0.1})
        for step, folder in work.snapshots.items():
            (folder / f"step-{step}").mkdir(parents=True)
            (folder / f"step-{step}" / "manifest.json").touch()
        assert work.branch is None or work.branch.is_dir()
        assert (work.config.tracking.parent_run, work.config.tracking.run_name) == ("parent", work.output.name)
        work.output.mkdir()
        (work.output / "certificate.json").write_text("{}")
        return Outcome("done", 3600.0)

    def release(self) -> None:
        pass

    def _accuracy(self, work: Work) -> float:
        known = type(self).accuracy
        return known(work.output.name) if known else work.config.leap.target


@pytest.fixture(autouse=True)
def _pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "Slot", Pretender)
    monkeypatch.setattr(Pretender, "accuracy", None)
    SEEN.clear()


def run(folder: Path, sweep: SweepConfig) -> RaySweep:
    trials = ladder_of(sweep) if sweep.mode == "ladder" else trials_of(sweep)
    line = RaySweep(sweep, trials, Storage(str(folder / "out"), folder), "accuracy")
    line.run(1, "parent")
    return line


def test_what_is_finished_is_not_run_again_and_what_failed_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    sweep = read_sweep(sweep_file(tmp_path, vary={"leap.target": [0.5, 0.01, 0.3]}))
    line = run(tmp_path, sweep)
    assert {name: outcome.kind for name, outcome in line.ended.items()} == {
        "0.5": "done",
        "0.01": "failed",
        "0.3": "done",
    }
    with (tmp_path / "out" / "trials.jsonl").open("a") as file:
        file.write('{"trial": "0.5", "ki')  # the driver was killed here
    run(tmp_path, sweep)
    assert SEEN == ["0.5", "0.01", "0.3", "0.01"]
    printed = capsys.readouterr().out
    assert "0.5: a rank is gone; it resumes from its last checkpoint" in printed
    assert "2/3  0.01  FAILED: no luck  0:01" in printed and "3 trials, 1 to run, up to 1 at a time" in printed


@pytest.mark.parametrize(
    ("budget", "num"), [({"trials": 2}, 2), ({"gpu_hours": 5}, 2), ({"hours": 1e-9}, 0), ({"hours": 1.0}, 4)]
)
def test_a_budget_ends_a_call(tmp_path: Path, budget: dict[str, float], num: int) -> None:
    (tmp_path / "out").mkdir()
    resources = {"cpus": 1, "gpus": 2}
    content: dict[str, Any] = {
        "vary": {"leap.target": [0.9, 0.7, 0.5, 0.3]},
        "resources": resources,
        "ranks": 2,
        "budget": budget,
    }
    run(tmp_path, read_sweep(sweep_file(tmp_path, **content)))
    assert len(SEEN) == num  # a trial here takes 4 GPU hours


def test_rungs_wait_for_their_walk(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    sweep = read_sweep(sweep_file(tmp_path, mode="ladder", vary={"leap.target": [0.2, 0.7, 0.4]}))
    run(tmp_path, sweep)
    assert SEEN == ["0.2", "0.7", "0.4"] and not (tmp_path / "out" / ".snapshots").exists()


def test_rungs_of_a_walk_that_failed_are_not_run(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run(tmp_path, read_sweep(sweep_file(tmp_path, mode="ladder", vary={"leap.target": [0.01, 0.7]})))
    assert SEEN == ["0.01"]


def test_a_stopped_trial_stays_stopped(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    cases = [{"leap.target": 0.5, "train.seed": seed} for seed in (1, 2, 3)]
    sweep = read_sweep(sweep_file(tmp_path, cases=cases, early_stop="asha"))
    (tmp_path / "out" / "trials.jsonl").write_text(
        json.dumps({"trial": "0.5_1", "kind": "stopped", "seconds": 1.0, "error": "", "metrics": {"accuracy": 0.9}})
        + "\n"
    )
    line = run(tmp_path, sweep)
    assert SEEN == ["0.5_2", "0.5_3"] and {outcome.kind for outcome in line.ended.values()} == {"stopped"}


@pytest.mark.parametrize("num_cut", [1, 2, 3])
def test_verdicts_do_not_change_where_a_sweep_is_cut_off(tmp_path: Path, num_cut: int) -> None:
    cases = [{"leap.target": 0.5, "train.seed": seed} for seed in range(4)]
    worth = dict(zip(("0.5_0", "0.5_1", "0.5_2", "0.5_3"), (0.9, 0.7, 0.8, 0.6), strict=True))
    Pretender.accuracy = worth.__getitem__
    (tmp_path / "out").mkdir()
    file = sweep_file(tmp_path, cases=cases, early_stop="asha")
    cut = read_sweep(file).model_copy(update={"budget": BudgetConfig(trials=num_cut)})
    assert run(tmp_path, cut).waiting
    kinds = {name: outcome.kind for name, outcome in run(tmp_path, read_sweep(file)).ended.items()}
    assert kinds == {"0.5_0": "done", "0.5_1": "stopped", "0.5_2": "stopped", "0.5_3": "stopped"}
    assert sorted(SEEN) == sorted(worth)


def test_a_trial_that_was_cut_off_after_the_rung_keeps_its_verdict(tmp_path: Path) -> None:
    """The driver was killed while "0.5_0" settled: it is best of what was seen then, but not of what comes later."""
    cases = [{"leap.target": 0.5, "train.seed": seed} for seed in (1, 0)]
    worth = {"0.5_0": 0.7, "0.5_1": 0.6}
    Pretender.accuracy = worth.__getitem__
    (tmp_path / "out").mkdir()
    sweep = read_sweep(sweep_file(tmp_path, cases=cases, early_stop="asha"))
    line = RaySweep(sweep, trials_of(sweep), Storage(str(tmp_path / "out"), tmp_path), "accuracy")
    assert line._look(line.waiting[1], State(1, 2, {"accuracy": 0.7})) is True  # and then the kill
    assert {name: outcome.kind for name, outcome in run(tmp_path, sweep).ended.items()} == {
        "0.5_1": "stopped",
        "0.5_0": "done",
    }


def test_what_a_full_disk_does_not_take_waits_and_ends_no_sweep(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_on_a_full_disk(self: Pretender, work: Work, watched: Any, lost: Any) -> Outcome:
        free(small_disk) if work.config.leap.target == 0.3 else fill(small_disk)
        return run_trial(self, work, watched, lost)

    run_trial = Pretender.run
    monkeypatch.setattr(Pretender, "run", run_on_a_full_disk)
    (small_disk / "out").mkdir()
    sweep = read_sweep(sweep_file(small_disk, vary={"leap.target": [0.01, 0.02, 0.3]}))
    run(small_disk, sweep)
    assert capsys.readouterr().out.count("trials.jsonl could not be written: No space left on device") == 1
    lines = (small_disk / "out" / "trials.jsonl").read_text().splitlines()
    assert [json.loads(line)["trial"] for line in lines] == ["0.01", "0.02", "0.3"]


def test_a_rank_tells_how_far_it_is_and_needs_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "DO_NOT_TRACK", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "1")
    rank = Rank(tmp_path, 1.0, 0)
    rank._notify(5, 10, {"loss": 0.5})
    assert (rank.state().step, rank.state().total) == (5, 10)
    with pytest.raises(ValueError, match=r"has no folder .*nowhere: a sweep needs one that all nodes share"):
        Rank(tmp_path / "nowhere", 1.0, 0)
