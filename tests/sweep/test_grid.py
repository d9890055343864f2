"""Combinations of settings, and the names of their folders."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from leap_dist.errors import UserError
from leap_dist.sweep.grid import expand, name_of, names, short


def test_every_combination_has_a_name_of_its_own() -> None:
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


def test_no_two_trials_share_a_folder_and_none_leaves_the_sweep() -> None:
    grid = [settings for key in ("leap.rule", "leap.mode") for settings in expand({key: NASTY})]
    grid += expand({"leap.rule": NASTY, "leap.mode": NASTY})
    found = names(grid)
    assert len({name.casefold() for name in found}) == len(found) == 2 * len(NASTY) + len(NASTY) ** 2
    assert all(re.fullmatch(r"[A-Za-z0-9][\w.\-]*", name, re.ASCII) and len(name) < 100 for name in found)
    taken = {"sweep.json", "report.html", "results.json", "trials.jsonl", "rungs.jsonl", "optuna.log", "settings.png"}
    assert not (taken | {f"{name}.log" for name in found}) & set(found)
    assert names(grid) == found and names([{}]) != [""]
    one = {"leap.rule": "a_b", "leap.mode": "c"}
    assert names([one]) == [found[grid.index(one)]]  # also in a sweep that has grown


def test_settings_in_a_table() -> None:
    gates = ["head", {"granularity": "neuron", "multiple_of": 64}]
    assert [short(0.5), short(gates), short({"teacher": "self", "alpha": 0.5}), short(None)] == [
        0.5, "head + neuron", "teacher self, alpha 0.5", "None",
    ]  # fmt: skip


def test_a_grid_of_ten_million_cells_is_refused_at_once() -> None:
    began = time.process_time()
    with pytest.raises(UserError, match="vary: got 10000000 combinations; allowed: at most 10000"):
        expand({f"train.key{number}": list(range(10)) for number in range(7)})
    assert time.process_time() - began < 1.0
