"""Studies: cells by name, real runs that are not run twice, means and spreads, and a picture."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from leap_dist.errors import UserError
from leap_dist.sweep.grid import expand, name_of, names, short
from leap_dist.sweep.study import Cell, read_study, run_study, summarize, table_lines, write_pictures
from tests.sweep import jobs
from tests.tracking.folders import Page, run_folder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "prune.py"
JOB = jobs.JOB | {"train": {"max_steps": 12, "eval_batch_size": 512}}


def study_file(folder: Path, **vary: list[Any]) -> Path:
    (folder / "job.json").write_text(json.dumps(JOB))
    file = folder / "study.json"
    keys = {key.replace("__", "."): values for key, values in vary.items()}
    file.write_text(json.dumps({"config": str(folder / "job.json"), "vary": keys}))
    return file


def cell(target: float, seed: int, accuracy: float, rule: str = "leap") -> Cell:
    settings = {"leap.rule": rule, "leap.target": target, "train.seed": seed}
    metrics: dict[str, dict[str, float | None]] = {"dense": {"accuracy": 0.9, "loss": 0.1}}
    return Cell(settings, "x", target, metrics | {"pruned": {"accuracy": accuracy, "loss": 1.0}}, {"w": target / 2})


def test_every_combination_is_a_cell_with_a_name_of_its_own() -> None:
    grid = expand({"leap.gates": [["head", "neuron"], "row", "block:4x4"], "leap.target": [0.5, 0.1]})
    assert [settings["leap.target"] for settings in grid] == [0.5, 0.1] * 3
    names = [name_of(settings) for settings in grid]
    assert len(set(names)) == 6 and names[2] == "row_0.5"
    assert all(name == Path(name).name and not name.startswith(".") for name in names)
    assert name_of({"leap.gates": ["head", "neuron"], "leap.target": 0.5}) == "head-neuron_0.5"
    assert name_of({"leap.gates": ["a", "b"]}) != name_of({"leap.gates": "a-b"})
    assert name_of({"leap.gates": ["a b"]}) != name_of({"leap.gates": ["a:b"]})
    assert len(name_of({"key": "x" * 500})) < 100


NASTY = [
    *("a_b", "c", "b_c", "a", ":", "/", ".", "..", "...", "", " ", "-", "_", "a/b", "a:b", "a-b", "a b", "a.b", "A/B"),
    *(
        "Adam",
        "adam",
        "ADAM",
        "0.5",
        0.5,
        "1",
        1,
        1.0,
        "true",
        True,
        None,
        "null",
        -1,
        1e-05,
        1e16,
        "~",
        "a\0b",
        "a\nb",
    ),
    *("../../etc", "/etc", "C:\\x", "report.html", "x.log", ".locks", "模型", "é", "e\u0301", "ß", "SS", "x" * 300),
    *(
        "x" * 301,
        "模" * 300,
        [],
        {},
        ["a", "b"],
        ["a_b"],
        ["a", ["b"]],
        {"a": 1},
        "2:4",
        "block:4x4",
        "block/4x4",
        "$(x)",
    ),
]


def test_no_two_cells_share_a_folder_and_none_leaves_the_study(tmp_path: Path) -> None:
    grid = [settings for key in ("leap.rule", "leap.mode") for settings in expand({key: NASTY})]
    grid += expand({"leap.rule": NASTY, "leap.mode": NASTY})
    found = names(grid)
    assert len({name.casefold() for name in found}) == len(found) == 2 * len(NASTY) + len(NASTY) ** 2
    assert all(re.fullmatch(r"[A-Za-z0-9][\w.\-]*", name, re.ASCII) and len(name) < 100 for name in found)
    taken = {"study.json", "report.html", "results.json", "trials.jsonl"} | {f"{name}.log" for name in found}
    assert not taken & set(found)
    assert names(grid) == found and names([{}]) != [""]
    one = {"leap.rule": "a_b", "leap.mode": "c"}
    assert names([one]) == [found[grid.index(one)]]  # also in a study that has grown


def test_settings_in_a_table() -> None:
    gates = ["head", {"granularity": "neuron", "multiple_of": 64}]
    assert [short(0.5), short(gates), short({"teacher": "self", "alpha": 0.5}), short(None)] == [
        0.5, "head + neuron", "teacher self, alpha 0.5", "None",
    ]  # fmt: skip


def test_means_and_spreads_over_seeds(tmp_path: Path) -> None:
    cells = [cell(0.5, 1, 0.8), cell(0.5, 2, 0.9), cell(0.1, 1, 0.6), cell(0.5, 1, 0.7, rule="movement")]
    points = summarize(cells)
    assert [(p.num, pytest.approx(p.mean), pytest.approx(p.spread)) for p in points] == [
        (2, 0.85, 0.0707107),
        (1, 0.6, 0.0),
        (1, 0.7, 0.0),
    ]
    assert table_lines(points)[0] | {"spread": 0} == {
        "rule": "leap",
        "target": 0.5,
        "density": 0.5,
        "mean": pytest.approx(0.85),
        "spread": 0,
        "seeds": 2,
        "dense": 0.9,
        "keep ratios": "0.250 to 0.250",
    }
    with pytest.raises(UserError, match=r'^metric: got "f1"; x has accuracy, loss; choose one'):
        summarize(cells, "f1")


@pytest.mark.long
def test_cells_are_real_runs_and_a_failure_stops_no_other(tmp_path: Path) -> None:
    study = read_study(study_file(tmp_path, leap__target=[0.5, 0.001], leap__gates=["row"]))
    told: list[str] = []
    cells = run_study(study, tmp_path / "out", SCRIPT, 2, told.append)
    assert [c.settings["leap.target"] for c in cells] == [0.5]
    assert cells[0].density == pytest.approx(0.5, abs=0.02) and set(cells[0].metrics) == {"dense", "pruned"}
    assert any("failed with exit code 2: " in line and "lowest possible" in line for line in told)
    certificate = tmp_path / "out" / cells[0].folder / "certificate.json"
    written = certificate.stat().st_mtime_ns
    again = run_study(study, tmp_path / "out", SCRIPT, 2, told.append)
    assert again == cells and certificate.stat().st_mtime_ns == written

    job = json.loads((tmp_path / "job.json").read_text()) | {"train": {"max_steps": 13, "eval_batch_size": 512}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    with pytest.raises(
        UserError, match=r"^--output: the run in .* another job.*\n  train\.max_steps: before 12, now 13"
    ):
        run_study(study, tmp_path / "out", SCRIPT, 2, told.append)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--output: .*file/out cannot be made: Not a directory; choose another"):
        run_study(study, tmp_path / "file" / "out", SCRIPT, 2, told.append)


def test_a_cell_that_fails_again_and_again_is_tried_again(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(
        "import pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--output') + 1])\n"
        "folder.mkdir(exist_ok=True)\n"
        "(folder / 'metrics.jsonl').touch()\n"
        "sys.exit('no luck')\n"
    )
    study, told = read_study(study_file(tmp_path, leap__target=[0.5])), list[str]()
    for _ in range(4):
        assert run_study(study, tmp_path / "out", script, 1, told.append) == []
    assert sum("0.5: failed with exit code 1: no luck" in line for line in told) == 4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.5", "0.5.log", "study.json"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (
            {"config": "ds_leap.json", "vary": {"leap.target": []}},
            r"vary\.leap\.target: got \[\]; allowed: one or more",
        ),
        ({"config": "ds_leap.json", "vary": {"leap.targe": [0.5]}}, r"leap\.targe: got 0\.5, unknown key"),
        ({"config": "ds_leap.json", "vary": {"leap.target": [1.5]}}, r"leap\.target: got 1\.5; allowed"),
        ({"config": "ds_leap.json", "vary": {}}, r"\.vary: got {}; allowed: an object of dotted keys"),
        ({"config": "nowhere.json", "vary": {"leap.target": [0.5]}}, r"config: no file nowhere\.json"),
        ({"config": "ds_leap.json", "varry": {}}, r"varry: got {}, unknown key; .*did you mean .*vary"),
    ],
)
def test_a_mistake_in_a_study_is_one_message(tmp_path: Path, content: dict[str, Any], match: str) -> None:
    file = tmp_path / "study.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=match):
        read_study(file)


def test_the_launcher_tells_of_a_missing_study(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "study.py"), str(tmp_path / "none.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "cannot be read" in done.stderr and "Traceback" not in done.stderr


def test_every_study_in_configs_is_valid() -> None:
    for file in (ROOT / "configs" / "studies").glob("*.json"):
        assert read_study(file).vary


def test_pictures_and_a_page_of_all_cells(tmp_path: Path) -> None:
    cells = []
    for number, (seed, accuracy) in enumerate(((1, 0.8), (2, 0.9))):
        folder = run_folder(tmp_path / f"cell{number}")
        cells.append(replace(cell(0.5, seed, accuracy), folder=folder.name))
    files = write_pictures(cells, summarize(cells), None, tmp_path)
    assert [file.name for file in files] == [
        "study.png",
        "study.svg",
        "study_dark.svg",
        "report.html",
    ]
    assert files[0].read_bytes().startswith(b"\x89PNG") and "accuracy" in files[1].read_text("utf-8")
    page = Page(files[-1].read_text("utf-8"))
    assert page.count["tbody"] == 2 and "★ cell1" in page.text and "★ cell0" not in page.text


def test_a_grid_of_ten_million_cells_is_refused_at_once() -> None:
    began = time.process_time()
    with pytest.raises(UserError, match="vary: got 10000000 combinations; allowed: at most 10000"):
        expand({f"train.key{number}": list(range(10)) for number in range(7)})
    assert time.process_time() - began < 1.0
