"""Random searches and searches by Optuna: what is drawn, refused, left out and resumed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from leap_dist.errors import UserError
from leap_dist.sweep.line import Line
from leap_dist.sweep.optuna_study import STUDY
from leap_dist.sweep.space import corners, drawn
from leap_dist.sweep.sweep_file import identity, read_sweep, trials_of
from tests.sweep.jobs import JOB, sweep_file
from tests.sweep.lines import SEARCH, done, line_of, run

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize(("num_run", "num_left"), [(6, 0), (5, 1)])
def test_fewer_samples_than_have_begun_begin_no_more(tmp_path: Path, num_run: int, num_left: int) -> None:
    search = SEARCH | {"search": "optuna"}
    line = line_of(tmp_path, read_sweep(sweep_file(tmp_path, **search | {"samples": 6, "budget": {"trials": num_run}})))
    run(line, done)
    begun = [line.take(None) for line in [line_of(tmp_path, line.sweep)]]  # the sixth, and then a kill
    again = line_of(tmp_path, read_sweep(sweep_file(tmp_path, **search | {"samples": 3})))
    assert again.about == f"6 trials, {num_left} to run" and again.num_left == num_left
    assert run(again, done) == [work.output.name for work in begun if work]


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


@pytest.mark.parametrize("rules", [["leap", "movement"], ["movement", "leap"]])
def test_a_search_leaves_out_what_does_not_go_together_in_whatever_order(tmp_path: Path, rules: list[str]) -> None:
    vary = {"leap.rule": rules, "leap.threshold_learning_rate": ["auto", 0.5], "leap.target": [0.5, 0.2]}
    sweep = read_sweep(sweep_file(tmp_path, search="optuna", samples=8, vary=vary))
    assert trials_of(sweep) == [] and identity(sweep, [])["search"] == "optuna"
    line = line_of(tmp_path, sweep)
    assert len(run(line, done)) == 6  # movement has no thresholds to learn
    found = trials_of(read_sweep(sweep_file(tmp_path, search="random", samples=8, vary=vary)))
    assert sorted(str(trial.settings) for trial in found) == sorted(str(trial.settings) for trial in line.trials)


def test_a_value_that_goes_with_nothing_is_refused(tmp_path: Path) -> None:
    vary = {"leap.rule": ["leap", "movement"], "leap.threshold_learning_rate": ["auto", -1, 0.5]}
    sweep = read_sweep(sweep_file(tmp_path, search="random", samples=8, vary=vary))
    with pytest.raises(UserError, match=r"leap\.threshold_learning_rate: got -1.*\n  in the trial"):
        trials_of(sweep)


def test_a_search_that_finds_no_valid_job_is_refused(tmp_path: Path) -> None:
    job = {"train": {key: value for key, value in JOB["train"].items() if key != "max_steps"}}
    vary = {"train.max_steps": [*range(20, 140), None], "train.epochs": [*range(1, 121), None]}  # one of them is null
    sweep = read_sweep(sweep_file(tmp_path, job, search="random", samples=1, vary=vary))
    with pytest.raises(UserError, match=r"^vary: none of 100 settings drawn from it is a valid job; give the keys"):
        trials_of(sweep)


def test_optuna_that_is_not_there_is_the_users_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "optuna"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    sweep = read_sweep(sweep_file(tmp_path, **SEARCH | {"search": "optuna"}))
    with pytest.raises(UserError, match=r'search: Optuna is not installed; pip install -e "\.\[search\]", or set'):
        trials_of(sweep)


def test_a_search_keeps_its_dense_reference_for_the_trials_to_come(tmp_path: Path) -> None:
    sweep = read_sweep(sweep_file(tmp_path, **SEARCH | {"search": "optuna", "samples": 2, "budget": {"trials": 1}}))
    (tmp_path / "out" / ".dense_reference").mkdir(parents=True)
    for num_left in (1, 0):
        assert len(run(line_of(tmp_path, sweep), done)) == 1
        assert (tmp_path / "out" / ".dense_reference").exists() == bool(num_left)
