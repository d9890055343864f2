"""Runs of a real sqlite store side by side: which are read, what is shown of them, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from leap_dist.config.sections import TrackingConfig
from leap_dist.errors import UserError
from leap_dist.export import certificate as cert
from leap_dist.run_folder import SINGLE_FILE
from leap_dist.tracking import runs as runs_module
from leap_dist.tracking.compare import (
    Answer,
    Request,
    choose_metric,
    compare,
    differences,
    finished,
    parse_condition,
    rows_of,
    write,
)
from leap_dist.tracking.mlflow import Tracker
from leap_dist.tracking.overlap import FOLDER, overlaps
from leap_dist.tracking.rows import entries, points
from leap_dist.tracking.runs import Selection, StoredRun, find, read_runs
from tests.tracking.folders import Page, export_card

CLOCK = {"data": {"task": "builtin/clock"}}
PARENT = "a" * 32
TABLE = "accuracy; * on the Pareto front"


def track(uri: str, experiment: str, name: str, target: float, metrics: dict[str, float], **tags: str) -> None:
    """A run as train/loop.py leaves it; without metrics it is one that failed."""
    config = CLOCK | {"leap": {"target": target, "rule": "leap"}, "train": {"seed": 1}}
    parent = tags.pop("parent", None)
    tracking = TrackingConfig(mlflow_uri=uri, experiment=experiment, run_name=name, parent_run=parent)
    with Tracker(tracking, config, True, tags={f"leap.{key}": value for key, value in tags.items()}) as tracker:
        tracker.log(1, {"loss": 1.0, "density": 1.0})
        if metrics:
            tracker.log(2, metrics)
        else:
            tracker.finish("FAILED")


def ending(accuracy: float, density: float) -> dict[str, float]:
    loss = 1.0 - accuracy
    values = {"pruned_accuracy": accuracy, "pruned_loss": loss, "dense_accuracy": 0.95, "dense_loss": 0.05}
    return values | {"pruned_density": density, "kept_weights": 1000 * density, "leap_ms": 5.0}


@pytest.fixture(scope="module")
def store(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three experiments: finished runs, a sweep's, and those of an older version and of another task."""
    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path_factory.mktemp('store'))}"
    track(uri, "ratios", "small", 0.1, ending(0.80, 0.1001), rule="leap", metric="accuracy")
    track(uri, "ratios", "middle", 0.3, ending(0.90, 0.3), rule="leap", metric="accuracy")
    track(uri, "ratios", "beaten", 0.5, ending(0.85, 0.5), rule="move'ment", metric="accuracy")
    track(uri, "ratios", "broken", 0.5, {})
    track(uri, "sweeps", "small", 0.2, ending(0.84, 0.2), parent=PARENT)
    with Tracker(
        TrackingConfig(mlflow_uri=uri, experiment="sweeps", run_name="the sweep"), {"sweep": {}}, True
    ) as sweep:
        sweep.log(0, {"trials": 1})
    track(uri, "others", "old", 0.4, {"pruned_accuracy": 0.7, "density": 0.4})
    track(uri, "others", "perplexed", 0.4, {"pruned_perplexity": 9.0, "pruned_density": 0.4})
    return uri


def names(runs: Sequence[StoredRun]) -> list[str]:
    return sorted(run.name for run in runs)


def stored(name: str, target: float, metrics: dict[str, float], **tags: str) -> StoredRun:
    """A run that no store has seen."""
    run_id = name.encode().hex().ljust(32, "0")
    found = {f"leap.{key}": value for key, value in tags.items()}
    return StoredRun(run_id, name, "FINISHED", 2.0, {"leap.target": str(target), "data.task": "t"}, metrics, found)


def of_task(run: StoredRun, task: str, data: str = "") -> StoredRun:
    return replace(run, params={**run.params, "data.task": task}, data=data)


# ------------------------------------------------------------------------------ which runs are read


@pytest.mark.parametrize("page", [1000, 2])
def test_runs_are_chosen_by_what_they_are(store: str, page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_module, "REQUEST_SIZE", page)
    assert len(read_runs(store, Selection())) == 8
    assert names(read_runs(store, Selection(["ratios"]))) == ["beaten", "broken", "middle", "small"]
    assert len(read_runs(store, Selection(["ratios", "sweeps"]))) == 6
    assert names(read_runs(store, Selection(sweep=PARENT))) == ["small"]
    assert names(read_runs(store, Selection(tags=["leap.rule=leap"]))) == ["middle", "small"]
    assert names(read_runs(store, Selection(tags=["leap.rule=move'ment", "leap.metric=accuracy"]))) == ["beaten"]


def test_runs_are_found_by_id_and_by_name(store: str) -> None:
    (middle, old) = read_runs(store, Selection(runs=["middle", "old"]))
    assert (middle.name, old.name) == ("middle", "old")
    assert [run.id for run in read_runs(store, Selection(runs=[old.id, middle.id]))] == [old.id, middle.id]
    assert read_runs(store, Selection(runs=[old.id[:12]]))[0].id == old.id
    assert names(read_runs(store, Selection(["sweeps"], runs=["small"]))) == ["small"]
    assert middle.metrics["pruned_accuracy"] == 0.9 and middle.params["leap.target"] == "0.3"
    assert middle.status == "FINISHED" and middle.seconds is not None and middle.seconds < 60


@pytest.mark.parametrize(
    ("selection", "match"),
    [
        (Selection(["ratois"]), r"^--experiment: there is no ratois; known: ratios, .*others"),
        (Selection(runs=["midle"]), r"^no run has the id or name midle; did you mean middle\?"),
        (Selection(runs=["f" * 32]), r"^no run has the id or name f{32}$"),
        (Selection(runs=["small"]), r"^2 runs are called small; name one by its id: \w{32}, \w{32}$"),
        (Selection(sweep="nope"), r"^sqlite:.* has no run with --sweep nope$"),
        (Selection(["ratios"], tags=["leap.rule=x"]), r"has no run with --experiment ratios --tag leap\.rule=x$"),
        (Selection(tags=["leap.rule"]), r"^--tag: got leap\.rule; allowed: key=value"),
        (Selection(tags=["`=1"]), r"^--tag: got `=1; allowed: key=value"),
        (Selection(tags=["a='\""]), r"^--tag: got '\"; allowed: text with one kind of quotes at most"),
    ],
)
def test_what_is_not_there_is_one_message(store: str, selection: Selection, match: str) -> None:
    with pytest.raises(UserError, match=match):
        read_runs(store, selection)


def test_very_many_names_are_cut(store: str) -> None:
    runs = [stored("same", 0.1, {}) for _ in range(25)]
    with pytest.raises(UserError, match=r"^25 runs are called same; .*, and 5 more$"):
        find(runs, "same")


@pytest.mark.parametrize(
    ("uri", "match"),
    [
        ("sqlite:///{}/no.db", r"^--uri: there is no database /.*/no\.db; name the store"),
        ("sqlite:///{}/text.db", r"^--uri: MLflow at .*text\.db cannot be read: file is not a database; name"),
        ("sqlite:///{}/other.db", r"^--uri: the database /.*/other\.db is not MLflow's; name the store"),
        ("nonsense://me:secret@x", r"^--uri: MLflow at nonsense://\*\*\*@x cannot be read: .*unsupported URI"),
        ("http://me:secret@127.0.0.1:9", r"^--uri: MLflow at http://\*\*\*@127.0.0.1:9 cannot be read: .*refused"),
        ("", r"^--uri: got nothing; allowed: an MLflow tracking URI"),
    ],
)
def test_a_store_that_cannot_be_read_is_left_as_it_is(uri: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database, but long enough to look like a file with a header")
    with sqlite3.connect(tmp_path / "other.db") as database:
        database.execute("CREATE TABLE runs (id TEXT)")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=match) as caught:
        read_runs(uri.format(tmp_path), Selection())
    assert "secret" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_read_only_database_is_read(store: str, tmp_path: Path) -> None:
    copy = tmp_path / "mlflow.db"
    copy.write_bytes(Path(store.removeprefix("sqlite:///")).read_bytes())
    copy.chmod(0o444)
    tmp_path.chmod(0o555)
    assert len(read_runs(f"sqlite:///{copy}", Selection(["ratios"]))) == 4
    assert list(tmp_path.iterdir()) == [copy]


# ------------------------------------------------------------------------------ what is shown of them


def test_a_table_says_what_was_traded(store: str) -> None:
    answer = compare(read_runs(store, Selection(["ratios"])), Request())
    lines = answer.tables[TABLE]
    assert [(line["run"], line["front"]) for line in lines] == [("small", "*"), ("middle", "*"), ("beaten", "")]
    assert lines[1].items() >= {"target": 0.3, "density": 0.3, "accuracy": 0.9, "weights": 300, "LEAP ms": 5.0}.items()
    assert lines[1]["Δ dense"] == pytest.approx(-0.05)
    (note,) = answer.notes
    assert note.startswith("left out: broken (") and note.endswith("did not finish, its status is FAILED")
    front = compare(read_runs(store, Selection(["ratios"])), Request(pareto=True))
    assert [line["run"] for line in front.records] == ["small", "middle"]


def test_the_trials_of_a_sweep_come_without_the_sweep(store: str) -> None:
    answer = compare(read_runs(store, Selection(["sweeps"])), Request())
    assert [line["run"] for line in answer.records] == ["small"] and not answer.notes


def test_a_run_of_an_older_version_lacks_what_it_did_not_log(store: str) -> None:
    answer = compare(read_runs(store, Selection(runs=["old", "middle"])), Request(), all_named=True)
    old = answer.tables[TABLE][1]
    assert old["density"] == 0.4 and not {"weights", "Δ dense", "LEAP ms"} & old.keys()
    assert answer.records[1]["kept_weights"] is None


def test_what_an_export_weighs_and_how_fast_it_is(tmp_path: Path) -> None:
    export_card(tmp_path / "small", "shrunk", 3.0)
    export_card(tmp_path / "small", "onnx", 1.0)
    metrics = {"pruned_accuracy": 0.5, "pruned_density": 0.1}
    runs = [stored("gone", 0.1, metrics, folder="/nowhere"), stored("none", 0.1, metrics)]
    runs.append(stored("small", 0.1, metrics, folder=str(tmp_path / "small")))
    answer = compare(runs, Request())
    gone, none, small = answer.tables[TABLE]  # equal in all that is sorted by, so in the order of the store
    assert small.items() >= {"parameters": 2000, "MB": 0.008, "latency ms": 1.0}.items()
    assert not {"parameters", "MB", "latency ms"} & (gone.keys() | none.keys())
    assert [(r["run"], r["export"], r["bytes"], r["latency_ms"]) for r in answer.records] == [
        ("gone", None, None, None), ("none", None, None, None), ("small", "onnx", 8000, 1.0),
    ]  # fmt: skip
    (tmp_path / "small" / "export" / "onnx" / "card.json").write_text("{")
    with pytest.raises(UserError, match=r"^.*/onnx/card\.json: damaged: "):
        compare(runs, Request())


def test_a_named_run_has_to_be_finished(store: str) -> None:
    with pytest.raises(
        UserError, match=r"^broken \(\w{8}\) has no density .*: it did not finish, its status is FAILED"
    ):
        compare(read_runs(store, Selection(runs=["broken", "middle"])), Request(), all_named=True)
    with pytest.raises(UserError, match=r"^the sweep \(\w{8}\) is not a pruning job: it has no leap\.target"):
        compare(read_runs(store, Selection(runs=["the sweep"])), Request(), all_named=True)
    with pytest.raises(UserError, match=r"^none of the 1 runs is a pruning job"):
        compare(read_runs(store, Selection(runs=["the sweep"])), Request())
    with pytest.raises(UserError, match=r"did not finish(.*\n){5}  and 2 more$"):
        finished([stored(f"run{i}", 0.1, {}) for i in range(7)], asked_for=False)


def test_a_run_that_was_killed_may_seem_to_run() -> None:
    alive = replace(stored("alive", 0.1, {}), status="RUNNING")
    match = r"^alive \(\w{8}\) has no density of a pruned model: it is running still, or was killed$"
    with pytest.raises(UserError, match=match):
        finished([alive], asked_for=True)


def test_runs_with_different_metrics_are_told_apart(store: str) -> None:
    runs = read_runs(store, Selection(["others", "sweeps"]))
    with pytest.raises(UserError, match=r"no metric in common(.*\n)+.*perplexity: perplexed") as caught:
        compare(runs, Request())
    assert "\n  accuracy: old" in str(caught.value) and "\n  accuracy, loss: small" in str(caught.value)
    runs = read_runs(store, Selection(["ratios"]))
    with pytest.raises(UserError, match=r"^--metric: not all runs have f1; .*\n  accuracy, loss: .*beaten"):
        compare(runs, Request(metric="f1"))
    assert "loss; * on the Pareto front" in compare(runs, Request(metric="pruned_loss")).tables


def test_the_main_metric_of_the_task_comes_first() -> None:
    metrics = {"pruned_exact_match": 1.0, "pruned_f1": 1.0, "pruned_a_loss": 1.0, "pruned_density": 0.5}
    assert choose_metric([stored("a", 0.5, metrics, metric="f1")], None) == "f1"
    assert choose_metric([stored("a", 0.5, metrics)], None) == "exact_match"


def test_less_is_better_for_a_loss_and_no_number_is_no_value() -> None:
    losses = {"good": 0.1, "bad": 0.2, "lost": math.nan, "far": math.inf}
    runs = [stored(name, 0.5, {"pruned_loss": value, "pruned_density": 0.5}) for name, value in losses.items()]
    rows = rows_of(runs, "loss")
    assert {row.run.name: row.front for row in rows} == {"good": True, "bad": False, "lost": False, "far": False}
    answer = compare(runs, Request(best="loss<=0.3"))
    assert [line["run"] for line in answer.records] == ["good"]
    json.loads(json.dumps(compare(runs, Request()).records, allow_nan=False))
    (nothing,) = compare(runs[2:], Request(best="loss<1")).notes
    assert nothing == "no run has loss < 1: none has a number there"


def test_best_is_the_smallest_that_is_good_enough(store: str) -> None:
    runs = read_runs(store, Selection(["ratios"]))
    answer = compare(runs, Request(best="accuracy >= 0.85"))
    assert [line["run"] for line in answer.records] == ["middle"]
    assert list(answer.tables) == ["the smallest density with accuracy >= 0.85"]
    answer = compare(runs, Request(best="accuracy>0.99"))
    assert not answer.records and not answer.tables
    assert answer.notes[-1].startswith("no run has accuracy > 0.99; the nearest is 0.9, middle (")
    with pytest.raises(UserError, match=r"^--metric: not all runs have f1"):
        compare(runs, Request(best="f1>=0.5", metric="accuracy"))


def test_best_is_of_one_task() -> None:
    """The smallest run of another task is none that can be put in its place, and not registered as it."""
    cls = of_task(stored("cls", 0.3, ending(0.9, 0.3)), "text/classification", "dev.tsv 12345678")
    other = of_task(stored("other", 0.2, ending(0.7, 0.2)), "text/classification", "a/b c validation")
    base = of_task(stored("base", 0.1, ending(0.5, 0.1)), "builtin/clock")
    match = r"^--best: got \"accuracy >= 0\.4\"; runs of 2 tasks .* one with --runs, --tag or --experiment:"
    with pytest.raises(UserError, match=match) as caught:
        compare([cls, base], Request(best="accuracy>=0.4", register="foo@champion"))
    names = ["builtin/clock: base (62617365)", "text/classification on dev.tsv 12345678: cls (636c7300)"]
    assert str(caught.value).split("\n  ")[1:] == names
    match = (
        r"runs of 2 sets of validation data .*\n  text/\w+ on a/b c validation: other .*\n.* on dev.tsv 12345678: cls "
    )
    with pytest.raises(UserError, match=match):
        compare([cls, other], Request(best="accuracy>=0.4"))
    for runs, condition, name in (([cls, base], "accuracy>0.8", "cls"), ([cls, cls], "accuracy>=0.4", "cls")):
        assert [line["run"] for line in compare(runs, Request(best=condition)).records] == [name]


def test_a_front_is_of_one_task_and_data(tmp_path: Path) -> None:
    """A run judged on easier data beats none of another's."""
    found = {"easy": ("a.tsv 1", 0.1, 0.9), "hard": ("b.tsv 2", 0.3, 0.7), "worse": ("a.tsv 1", 0.4, 0.8)}
    runs = [of_task(stored(name, d, ending(a, d)), "text/classification", data) for name, (data, d, a) in found.items()]
    answer = compare(runs, Request(report=tmp_path / "report.html"))
    assert {line["run"]: (line["data"], line["front"]) for line in answer.records} == {
        "easy": ("a.tsv 1", True),
        "worse": ("a.tsv 1", False),
        "hard": ("b.tsv 2", True),
    }
    (lines,) = answer.tables.values()
    names = ["text/classification: a.tsv 1", "text/classification: a.tsv 1", "text/classification: b.tsv 2"]
    assert [line["task"] for line in lines] == names
    assert {point.group for point in points(rows_of(runs, "accuracy"))} == set(names)
    assert all(name in (tmp_path / "report.html").read_text("utf-8") for name in names)


@pytest.mark.parametrize("text", ["accuracy", ">=0.9", "accuracy=0.9", "accuracy>=high", "accuracy>=nan", ""])
def test_a_condition_that_is_none(text: str) -> None:
    with pytest.raises(UserError, match=r"^--best: got \".*\"; allowed: a metric, one of >= <= > <, and a number"):
        Request(best=text)
    assert str(parse_condition(" pruned_f1<= 2e-1 ")) == "f1 <= 0.2"


def test_what_two_runs_differ_in(store: str) -> None:
    small, middle = read_runs(store, Selection(["ratios"], runs=["small", "middle"]))
    (table,) = differences(small, middle).tables.values()
    assert {line["parameter"]: (line["small"], line["middle"]) for line in table} == {"leap.target": ("0.1", "0.3")}
    same = differences(small, small)
    assert not same.records and same.notes[0].endswith("have the same parameters")
    other = stored("small", 0.1, {})
    lines = differences(small, other).records
    assert {"parameter": "train.seed", small.id: "1", other.id: "(not set)"} in lines


# ------------------------------------------------------------------------------ files


def test_pictures(store: str, tmp_path: Path) -> None:
    runs = read_runs(store, Selection(["ratios"]))
    for name in ("front.png", "front.svg"):
        answer = compare(runs, Request(plot=tmp_path / name))
        assert (tmp_path / name).stat().st_size > 1000 and answer.notes[-1] == f"picture: {tmp_path / name}"
    assert "Pareto front" in (tmp_path / "front.svg").read_text("utf-8")
    with pytest.raises(UserError, match=r"^--plot: got front\.pdf; allowed: a file that ends in \.png or \.svg"):
        Request(plot=Path("front.pdf"))
    with pytest.raises(UserError, match=r"^--plot: .*/none/a\.png cannot be written: No such file"):
        compare(runs, Request(plot=tmp_path / "none" / "a.png"))
    lost = stored("lost", 0.5, {"pruned_accuracy": math.nan, "pruned_density": 0.5})
    with pytest.raises(UserError, match=r"^--plot: there is nothing to draw: no run has a number for accuracy"):
        compare([lost], Request(plot=tmp_path / "a.png"))


def test_a_page_of_all_runs(store: str, tmp_path: Path) -> None:
    runs = read_runs(store, Selection(["ratios"]))
    answer = compare(runs, Request(report=tmp_path / "a.html", best="accuracy>=0.85"))
    assert answer.notes[-1] == f"report: {tmp_path / 'a.html'}" and len(answer.records) == 1
    page = Page((tmp_path / "a.html").read_text("utf-8"))
    assert page.count["tbody"] == 3 and page.count["svg"] == 1 and "left out: broken" in page.text
    assert all(part in page.text for part in ("★ small", "middle", "beaten", "data.task"))
    lost = stored("lost", 0.5, {"pruned_accuracy": math.nan, "pruned_density": 0.5})
    compare([lost], Request(report=tmp_path / "b.html"))
    assert Page((tmp_path / "b.html").read_text("utf-8")).count["tbody"] == 1
    with pytest.raises(UserError, match=r"^--report: got a\.htm; allowed: a file that ends in \.html"):
        Request(report=Path("a.htm"))
    with pytest.raises(UserError, match=r"^--report: .*/none/a\.html cannot be written: No such file"):
        compare(runs, Request(report=tmp_path / "none" / "a.html"))


def test_records_are_written(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = compare(read_runs(store, Selection(["ratios"])), Request())
    write(answer, "-", tmp_path / "a.csv")
    records: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [record["run"] for record in records] == ["small", "middle", "beaten"]
    assert records[0]["metric"] == "accuracy" and records[0]["front"] is True and len(records[0]["id"]) == 32
    with (tmp_path / "a.csv").open(newline="") as file:
        assert [float(line["value"]) for line in csv.DictReader(file)] == [0.8, 0.9, 0.85]
    write(answer, str(tmp_path / "a.json"), None)
    assert json.loads((tmp_path / "a.json").read_text()) == records
    with pytest.raises(UserError, match=r"^--json, --csv: .*/none/a\.csv cannot be written: No such file"):
        write(answer, None, tmp_path / "none" / "a.csv")


# ------------------------------------------------------------------------------ overlap of masks


def run_folder(folder: Path, mask: torch.Tensor, permuted: bool | str = False) -> Path:
    """The least that is a finished run: one pruned matrix."""
    (folder / "model").mkdir(parents=True)
    save_file({"layer.weight": mask.float()}, folder / "model" / SINGLE_FILE)
    gates = [{"granularity": "element", "tensors": ["layer.weight"]}]
    counts = cert.count(folder / "model", [("layer.weight", mask)], gates)
    made = cert.build(counts, target=counts["density"], unit=1, metrics={}, seed=1, permuted=permuted)
    cert.write(folder / "certificate.json", made)
    (folder / "config.json").write_text('{"leap": {}, "model": {}}')
    return folder


def test_masks_of_columns_in_different_orders_are_not_compared(tmp_path: Path) -> None:
    mask = torch.rand(3, 8) < 0.5
    folders = [run_folder(tmp_path / "a", mask), run_folder(tmp_path / "b", mask, permuted="0f" * 8)]
    runs = [stored(folder.name, 0.5, {}, folder=str(folder)) for folder in folders]
    with pytest.raises(UserError, match=r"^--masks: b .* and a .* different orders \(leap.permute\); choose runs with"):
        overlaps(runs)
    assert len(overlaps([runs[1], runs[1]])) == 2


def test_masks_are_compared_weight_by_weight(tmp_path: Path) -> None:
    one, other = torch.zeros(3, 7, dtype=torch.bool), torch.zeros(3, 7, dtype=torch.bool)
    one[0], other[0, :4], other[2, 0] = True, True, True
    folders = [run_folder(tmp_path / "a", one), run_folder(tmp_path / "b", other)]
    metrics = {"pruned_accuracy": 0.5, "pruned_density": 0.5}
    runs = [stored(folder.name, 0.5, metrics, folder=str(folder)) for folder in folders]
    lines = list(compare(runs, Request(masks=True)).tables.values())[1]
    assert [list(line.values())[1:] for line in lines] == [[1.0, 4 / 8], [4 / 8, 1.0]]
    wide = run_folder(tmp_path / "c", torch.ones(3, 9, dtype=torch.bool))
    with pytest.raises(UserError, match=r"^--masks: c .* and a .* have not pruned the same tensors"):
        overlaps([runs[0], stored("c", 0.5, {}, folder=str(wide))])
    with pytest.raises(UserError, match=r"^--masks: the files of d .* are needed, and /nowhere is not on this machine"):
        overlaps([runs[0], stored("d", 0.5, {}, folder="/nowhere")])
    with pytest.raises(UserError, match=rf"^--masks: the files of e .* the run has no tag {FOLDER}"):
        overlaps([runs[0], stored("e", 0.5, {})])
    with pytest.raises(UserError, match=r"^--masks: got 1 runs; allowed: 2 to 20"):
        overlaps(runs[:1])


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "\uff1d1", "|cmd"])
def test_a_name_is_no_formula_in_a_spreadsheet(tmp_path: Path, name: str) -> None:
    write(Answer({}, [{"run": name, "difference": -0.5}], []), None, tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"run": f"'{name}", "difference": "-0.5"}]


def test_a_title_is_no_formula_either(tmp_path: Path) -> None:
    one, other = (stored(name, target, {}) for name, target in (("=cmd()", 0.1), (" \u200b\t@x", 0.2)))
    write(differences(one, other), None, tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open(newline="") as file:
        assert next(csv.reader(file)) == ["parameter", "'=cmd()", "' \u200b\t@x"]


def test_a_run_is_known_by_what_made_its_masks() -> None:
    """Also where no rule learned them; its parameter says the default then."""
    shot = stored("shot", 0.5, ending(0.8, 0.5), rule="one_shot", metric="accuracy", gates="2:4")
    rows = rows_of([replace(shot, params={**shot.params, "leap.rule": "leap"})], "accuracy")
    assert [point.line for point in points(rows)] == ["one_shot, 2:4"]
    assert [entry.settings["rule"] for entry in entries(rows)] == ["one_shot"]
