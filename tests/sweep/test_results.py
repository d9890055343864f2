"""What came of a sweep: fronts, means over seeds, the table, the page and the pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from leap_dist.config.job_file import parse_job
from leap_dist.errors import UserError
from leap_dist.sweep.rank import Outcome
from leap_dist.sweep.result import Result, collect, means, metric_of
from leap_dist.sweep.results import mean_lines, print_table, table_lines, write
from leap_dist.sweep.sweep_file import read_sweep, trials_of
from leap_dist.tracking.pareto import pareto
from tests.ranks import RankPools
from tests.sweep.jobs import JOB, run_without_ray, sweep_file
from tests.tracking.folders import Page, export_card, run_folder


def test_the_front_is_what_no_other_beats() -> None:
    points = [("", 0.5, 0.9), ("", 0.3, 0.9), ("", 0.3, 0.8), None, ("", 0.1, 0.5), ("other", 0.9, 0.1)]
    assert pareto(points) == [False, True, False, False, True, True]


def test_results_as_table_picture_and_json(tmp_path: Path) -> None:
    sweep = read_sweep(sweep_file(tmp_path, vary={"leap.target": [0.5, 0.3, 0.1]}, ranks=2))
    trials = trials_of(sweep)
    for name, accuracy in (("0.5", 0.8), ("0.3", 0.85)):
        (tmp_path / name).mkdir()
        metrics = {"dense": {"accuracy": 0.9, "loss": 1.0}, "pruned": {"accuracy": accuracy, "loss": 2.0}}
        content = {"target": float(name), "density": float(name), "unit": 1, "kept": 7, "prunable": 14, "gates": [],
                   "tensors": {}, "metrics": metrics, "masks_sha256": "a" * 64, "weights_sha256": "b" * 64, "seed": 0,
                   "versions": {}}  # fmt: skip
        (tmp_path / name / "certificate.json").write_text(json.dumps(content))
    export_card(tmp_path / "0.3", "onnx", 1.5)
    ended = {"0.5": Outcome("done", 36.0), "0.1": Outcome("failed", 1.0, "no luck")}
    assert metric_of(sweep, [trial.config for trial in trials]) == "accuracy"
    results = collect(sweep, trials, ended, tmp_path, "accuracy")
    assert [(result.outcome, result.front) for result in results] == [
        ("done", False),
        ("done", True),
        ("failed", False),
    ]
    table = table_lines([replace(r, settings=r.settings | {"train.seed": 3}) for r in results], "accuracy", gpus=0)
    assert "seed" not in table[0] and [line["target"] for line in table] == [0.5, 0.3, 0.1]
    assert table[0]["CPU hours"] == pytest.approx(0.02) and table[0]["Δ dense"] == pytest.approx(-0.1)
    assert table[1]["latency ms"] == 1.5 and table[0]["parameters"] == "" and "LEAP ms" not in table[0]
    assert table[1]["front"] == "*" and table[1]["seconds"] == "" and table[2]["accuracy"] == ""
    names = write(results, "accuracy", tmp_path)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG") and "results.svg" in names
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "report.html" in names and page.count["tbody"] == 3 and "no luck" in page.text and "★ 0.3" in page.text
    assert write(results[2:], "accuracy", tmp_path / "0.5") == ["results.json", "report.html"]  # nothing to draw
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["trials"][2]["error"] == "no luck" and saved["trials"][1]["weights_sha256"] == "b" * 64


def finished(folder: Path, name: str, density: float, accuracy: float) -> None:
    (folder / name).mkdir()
    content = {"target": 0.5, "density": density, "unit": 1, "kept": 7, "prunable": 14, "gates": [], "tensors": {},
               "metrics": {"pruned": {"accuracy": accuracy}}, "masks_sha256": "a" * 64, "weights_sha256": "b" * 64,
               "seed": 0, "versions": {}}  # fmt: skip
    (folder / name / "certificate.json").write_text(json.dumps(content))


def test_a_front_and_a_panel_are_of_what_is_judged_on_the_same_data(tmp_path: Path) -> None:
    job = {"data": {"task": "lm", "train": "a.txt", "validation": "b.txt"}}
    vary = {"data.validation": ["b.txt", ["b.txt", "c.txt"]], "leap.target": [0.5, 0.2], "train.learning_rate": [1e-4]}
    trials = trials_of(read_sweep(sweep_file(tmp_path, job, vary=vary)))
    sweep = read_sweep(tmp_path / "sweep.json")
    for number, trial in enumerate(trials):
        finished(tmp_path, trial.name, (0.5, 0.2)[number % 2], (0.9, 0.8, 0.4, 0.3)[number])
    results = collect(sweep, trials, {}, tmp_path, "accuracy")
    assert [result.front for result in results] == [True] * 4  # the worst of one is no worse than the best of another
    write(results, "accuracy", tmp_path)
    drawn = (tmp_path / "results.svg").read_text("utf-8")
    assert "lm: b.txt c.txt" in drawn and "lm: b.txt" in drawn and "all trials" not in drawn
    assert json.loads((tmp_path / "results.json").read_text())["trials"][2]["data"] == "b.txt c.txt"


def test_a_trial_whose_data_do_not_give_the_metric_has_failed(tmp_path: Path) -> None:
    """Its value was empty, and the sweep said nothing; early stopping took each such trial for the worst."""
    rows = {"task": "lm", "train": "a.jsonl", "validation": "b.jsonl"}
    trials = trials_of(read_sweep(sweep_file(tmp_path, {"data": rows}, vary={"train.seed": [1, 2]})))
    sweep = read_sweep(tmp_path / "sweep.json")
    for trial in trials:
        finished(tmp_path, trial.name, 0.5, 0.9)
    found = collect(sweep, trials, {}, tmp_path, "bits_per_byte")
    assert [result.outcome for result in found] == ["failed"] * 2
    assert found[0].error == 'metric: got "bits_per_byte", which its data do not give; allowed: accuracy'


def test_a_metric_has_to_come_from_the_data_of_all_jobs(tmp_path: Path) -> None:
    given = {"train": "a.tsv", "validation": "b.tsv"}
    bert = {"name": "bert"}
    jobs = [parse_job(JOB | {"model": bert, "data": {"task": "glue/mnli", **own}}) for own in ({}, given)]
    sweep = read_sweep(sweep_file(tmp_path, {}, metric="validation_mismatched_accuracy", vary={"train.seed": [1]}))
    assert metric_of(sweep, jobs[:1]) == "validation_mismatched_accuracy"
    with pytest.raises(UserError, match=r"metric: got \"validation_mismatched_accuracy\"; allowed: what glue/mnli "):
        metric_of(sweep, jobs)


def test_no_setting_takes_the_place_of_another_column() -> None:
    weights = [{"leap.weights": "trained", "data.seed": 1, "train.seed": 2, "leap.target": 0.5},
               {"leap.weights": "frozen", "data.seed": 3, "train.seed": 4, "leap.target": 0.5}]  # fmt: skip
    results = [Result(f"trial {n}", row, "done", 0.5, 0.5, 0.8, weights=7) for n, row in enumerate(weights)]
    first, second = table_lines(results[:1] * 2 + results[1:], "accuracy", gpus=0)[1:]
    assert first.items() >= {"trial": "trial 0", "leap.weights": "trained", "data.seed": 1, "train.seed": 2}.items()
    assert second.items() >= {"trial": "trial 1", "leap.weights": "frozen", "target": 0.5, "train.seed": 4}.items()
    rates = [Result("x", {"train.learning_rate": n, "leap.weights": n}, "done", 0.5, weights=7) for n in (1, 2)]
    assert table_lines(rates, "accuracy", gpus=0)[1].items() >= {"learning rate": 2, "weights": 7}.items()


def test_gates_that_differ_in_options_alone_have_cells_and_lines_of_their_own(tmp_path: Path) -> None:
    gates = ["neuron", [{"granularity": "neuron", "uniform": True}]]
    results = [Result(f"{n}", {"leap.gates": gates[n]}, "done", 0.5, 0.5, 0.8 + n / 10) for n in range(2)]
    results += [Result("2", {"train.learning_rate": 1, "leap.gates": "head"}, "done", 0.5, 0.5, 0.7)]
    shown = [line["gates"] for line in table_lines(results, "accuracy", gpus=0)]
    assert shown == ["neuron", "neuron (uniform True)", "head"]
    write(results, "accuracy", tmp_path)
    drawn = (tmp_path / "results.svg").read_text("utf-8")
    assert "gates neuron (uniform True)" in drawn and "gates head, learning rate 1" in drawn
    assert "neuron (uniform True)" in Page((tmp_path / "report.html").read_text("utf-8")).text


def test_the_table_has_what_there_is_room_for(capsys: pytest.CaptureFixture[str]) -> None:
    rates = {f"train.rate{number}": number / 7 for number in range(14)}
    results = [Result(f"{n}", {k: v + n for k, v in rates.items()}, "done", 0.5, weights=7 + n) for n in range(2)]
    print_table(results, "accuracy", 0, "sweep")
    shown = capsys.readouterr().out
    assert "in all trials: outcome done" in shown and "no room for weights: results.json has them" in shown
    print_table([], "accuracy", 0, "sweep")
    assert capsys.readouterr().out.startswith("no trial has run: the budget was used up before, or no settings make a")


def test_a_sweep_without_a_trial_has_empty_results(tmp_path: Path, ranks: RankPools) -> None:
    search = {"search": "optuna", "samples": 2, "vary": {"leap.target": [0.5, 0.3]}, "budget": {"hours": 1e-9}}
    file = sweep_file(tmp_path, **search)
    assert ranks(1).run(run_without_ray, str(file), str(tmp_path / "out")) == [[]]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["trials"] == []
    assert "0 runs" in (tmp_path / "out" / "report.html").read_text()


def test_seeds_belong_together_in_whatever_order_the_keys_of_cases_are() -> None:
    one = {"leap.rule": "leap", "leap.target": 0.5, "train.seed": 1}
    other = {"train.seed": 2, "leap.target": 0.5, "leap.rule": "leap"}
    (found,) = means([Result("x", settings, "done", 0.5, 0.5, 0.8, 0.9) for settings in (one, other)])
    assert found.num == 2


def test_means_and_spreads_over_seeds() -> None:
    def result(target: float, seed: int, accuracy: float | None, rule: str = "leap") -> Result:
        settings = {"leap.rule": rule, "leap.target": target, "train.seed": seed}
        return Result("x", settings, "done", target, target, accuracy, 0.9)

    results = [result(0.5, 1, 0.8), result(0.5, 2, 0.9), result(0.1, 1, 0.6), result(0.5, 1, 0.7, "movement")]
    found = means([*results, result(0.1, 2, None)])
    assert [(mean.num, pytest.approx(mean.value), pytest.approx(mean.spread)) for mean in found] == [
        (2, 0.85, 0.0707107),
        (1, 0.6, 0.0),
        (1, 0.7, 0.0),
    ]
    assert mean_lines(found, "accuracy")[0] | {"spread": 0} == {
        "rule": "leap",
        "target": 0.5,
        "density": 0.5,
        "accuracy, mean": pytest.approx(0.85),
        "spread": 0,
        "seeds": 2,
        "dense": 0.9,
    }


def test_a_search_has_a_picture_of_its_settings(tmp_path: Path) -> None:
    results = []
    for number, rate in enumerate((1e-5, 1e-3, 1e-4)):
        settings = {"train.learning_rate": rate, "leap.gates": ["row", ["head", "neuron"]][number % 2]}
        folder = run_folder(tmp_path / f"{number}")
        results.append(Result(folder.name, settings, "done", 0.5, 0.5 - number / 10, 0.8 + number / 100, 0.9))
    results.append(Result("3", {"train.learning_rate": 1.0, "leap.gates": "row"}, "failed", 0.5))
    names = write(results, "accuracy", tmp_path, True, {"train.learning_rate": 0.25, "leap.gates": 0.75})
    assert {"settings.png", "settings.svg", "settings_dark.svg"} <= set(names)
    drawn = (tmp_path / "settings.svg").read_text("utf-8")
    assert drawn.index("leap.gates (75%)") < drawn.index("train.learning_rate (25%)")  # what matters most comes first
    whole = (tmp_path / "results.svg").read_text("utf-8")
    assert "trials" in whole and "dense model" not in whole  # one line for all, and none for each setting
    more = [replace(r, settings=r.settings | {"a.b": n, "a.c": n}) for n, r in enumerate(results)]
    table = table_lines(more, "accuracy", gpus=0)
    assert "learning rate" in table[0] and "CPU hours" not in table[0]
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "accuracy over each setting that was searched" in page and Page(page).count["figure"] == 2
    assert json.loads((tmp_path / "results.json").read_text())["importance"]["leap.gates"] == 0.75
