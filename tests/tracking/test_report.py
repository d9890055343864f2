"""The pages of a run and of several: well formed, all there, escaped, alone; and what is said of files that lack."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from leap_dist.errors import UserError
from leap_dist.run_folder import exports, read_files
from leap_dist.tracking import report
from leap_dist.tracking.pareto import Point, picture_of
from leap_dist.tracking.report import Entry, formatted, write_page, write_report
from tests.tracking.folders import LAYERS, MATRICES, Page, export_card, run_folder, steps

SECRET = {"tracking.mlflow_uri": "http://me:secret@host"}
HOSTILE = '"><script>alert(1)</script>'
NAMES = [
    *("\x1b[31mred", "\u202eturned", "\u2066isolated", "a\x00b", "\ud800", "$\\frac{$", "_first", "{{7*7}}", "%s%(x)s"),
    *(
        "</title><script>alert(1)</script>",
        "javascript:alert(1)",
        "![a](http://host/b.png)",
        "x" * 300,
        " ",
        "\ufeff=1",
    ),
]
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its report, and with two exports that were there before."""
    made = run_folder(tmp_path_factory.mktemp("runs") / "one & only")
    export_card(made, "shrunk", 3.0)
    export_card(made, "onnx", 1.0)
    export_card(made, "mask", None)
    write_report(made)
    return made


# ------------------------------------------------------------------------------ of one run


def test_a_run_has_its_pictures_and_its_page(folder: Path) -> None:
    plots = {path.name for path in (folder / "plots").iterdir()}
    assert plots == {f"{name}{end}" for name in ("course", "kept", "scores") for end in (".png", ".svg", "_dark.svg")}
    assert not list(folder.glob(".*"))
    text = (folder / "report.html").read_text("utf-8")
    page = Page(text)
    assert page.count["svg"] == 3 and page.count["table"] == 4
    assert page.count["tr"] == 3 + 4 + 2 + (1 + LAYERS * len(MATRICES) + 1)  # metrics, exports, gates, tensors
    for part in (
        "Kept 1,536 of 3,072 prunable weights: density 0.5000, asked for 0.5. accuracy: 0.9 dense → 0.8 pruned (-0.1)",
        "one & only: density 0.5",
        "bert.encoder.layer.11.output.dense.weight",
        "optimizer step",
        "8×8",
        "a" * 64,
        "all <b>of it</b>",
        "</pre><script>alert(1)</script>",
    ):
        assert part in page.text, part
    assert "secret" not in text and "***" in page.text
    assert page.text.index("onnx") < page.text.index("shrunk")  # the fastest first


def test_a_page_without_some_files_says_so(tmp_path: Path) -> None:
    made = run_folder(tmp_path / "run", metrics={"pruned": {"loss": 0.5}})
    for name in ("metrics.jsonl", "scores.json", "config.json"):
        (made / name).unlink()
    assert write_report(made) == [made / "plots", made / "report.html"]
    page = Page((made / "report.html").read_text("utf-8"))
    assert page.count["svg"] == 1 and "no metrics.jsonl" in page.text and "no scores.json" in page.text
    assert "asked for 0.5." in page.text and "dense →" not in page.text


def test_folders_that_hold_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^.*/run holds no finished run: it has no certificate\.json$"):
        write_report(tmp_path / "run")
    made = run_folder(tmp_path / "run")
    whole = (made / "metrics.jsonl").read_text()
    (made / "metrics.jsonl").write_text(whole + '{"step": 62, "lo')
    assert list(read_files(made).steps) == steps() and read_files(made).leap_ms == 3.0
    (made / "metrics.jsonl").write_text(whole + "oh no\n")
    with pytest.raises(
        UserError, match=r"^.*/metrics\.jsonl:31: damaged: not JSON: line 1, column 1: .*; restore the file, or remove"
    ):
        read_files(made)
    (made / "scores.json").write_text("[]")
    with pytest.raises(
        UserError, match=r"^.*/scores\.json: damaged: got \[\]; allowed: a JSON object; restore the file"
    ):
        read_files(made)


def test_the_fastest_export_counts(folder: Path, tmp_path: Path) -> None:
    assert [(e.kind, e.latency, e.parameters) for e in exports(folder)] == [
        ("onnx", 1.0, 2000), ("shrunk", 3.0, 2000), ("mask", None, None),
    ]  # fmt: skip
    assert exports(None) == exports(tmp_path / "gone") == []


def test_numbers_in_cells() -> None:
    values = [None, 0.123456, 12345.6, 1234567, 1e-9, "text", 0.0]
    assert [formatted(v) for v in values] == ["", "0.1235", "12,346", "1,234,567", "1e-09", "text", "0"]


# ------------------------------------------------------------------------------ of several


def entries(folder: Path) -> list[Entry]:
    best = {"density": 0.5, "value": 0.8, "dense": 0.9, "kept": 1536, "leap_ms": 3.0, "seconds": 70.0, "front": True}
    return [
        Entry("done", "done", {"gates": "head", "rule": "leap", "seed": "1"}, 0.5, folder=folder, **best),  # type: ignore[arg-type]
        Entry(
            HOSTILE, "failed", {"gates": HOSTILE, "rule": "leap"}, 0.1, error=f"no luck {HOSTILE}", parameters=SECRET
        ),
        Entry("gone", "done", {"gates": "row", "rule": "leap"}, 0.2, 0.2, None, folder=Path("/nowhere")),
    ]


def test_a_page_of_several_runs(folder: Path, tmp_path: Path) -> None:
    write_page(entries(folder), "accuracy", f"Sweep {HOSTILE}", None, tmp_path / "a.html", [f"left out: {HOSTILE}"])
    text = (tmp_path / "a.html").read_text("utf-8")
    page = Page(text)
    assert page.count["tbody"] == 3 and page.count["template"] == 3 and page.count["svg"] == 3
    assert "3 runs, 1 of them on the Pareto front" in page.text and "★ done" in page.text
    assert page.text.count(HOSTILE) >= 5 and text.count("<script") == 1
    titles = re.findall(r'<th scope="col"[^>]*><button type="button">([^<]*)', text)
    assert titles == ["run", "accuracy", "density", "Δ dense", "gates", "seed", "status", "target", "weights kept",
                      "parameters", "MB", "latency, ms", "LEAP, ms", "seconds"]  # fmt: skip
    assert page.count["select"] == 3 and "<option>head</option>" in text  # gates, seed and status; all have one rule
    assert 'data-value="0.8"' in text and 'data-value=""' in text
    assert "secret" not in text and "://***@host" in page.text
    assert "There are no pictures." in page.text and "no luck" in page.text


def test_pictures_of_very_many_runs_stay_in_their_folders(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MOST_DETAILED", 1)
    write_page(entries(folder)[::-1], "accuracy", "many", None, tmp_path / "a.html")
    page = Page((tmp_path / "a.html").read_text("utf-8"))
    assert page.count["svg"] == 3 and page.text.count("The pictures of this run are in its folder.") == 2


# ------------------------------------------------------------------------------ names that bite


def test_names_of_any_characters_on_the_page_of_a_run(tmp_path: Path) -> None:
    made = run_folder(tmp_path / "run")
    found, scored = (json.loads((made / name).read_text()) for name in ("certificate.json", "scores.json"))
    counted = next(iter(found["tensors"].values()))
    found["tensors"] = {f"layer.{number}.{name}.weight": counted for number, name in enumerate(NAMES)}
    found["gates"] = [found["gates"][0] | {"name": name, "granularity": name} for name in NAMES]
    found["metrics"]["pruned"] |= dict.fromkeys(NAMES, 0.5)
    for gate, name in zip(scored["gates"], NAMES, strict=False):
        gate["name"] = f"layer.3.{name}:head"
    scored["gates"][-1]["granularity"] = NAMES[0]
    job = {"data": {"task": "".join(NAMES)}, "leap": {}, "model": {"name": NAMES[1]}, "label_names": NAMES}
    for name, content in {"certificate": found, "scores": scored, "config": job}.items():
        (made / f"{name}.json").write_text(json.dumps(content))
    lines = (made / "metrics.jsonl").read_text()
    (made / "metrics.jsonl").write_text(lines.replace('"dense"', json.dumps(NAMES[0])).replace('"settle"', '"$x{$"'))
    write_report(made)
    text = (made / "report.html").read_text("utf-8")
    assert Page(text).count["svg"] == 3 and not OBEYED.search(text) and r"\x1b[31mred" in text


def test_names_of_any_characters_on_the_page_of_several_runs(tmp_path: Path) -> None:
    runs = [
        Entry(name, "done", {"task": name}, 0.5, 0.5, 0.8, 0.9, error=name, parameters={name: name}) for name in NAMES
    ]
    points = [Point(NAMES[number // 4], name, 0.5, 0.8, 0.9) for number, name in enumerate(NAMES)]
    write_page(runs, NAMES[0], NAMES[1], picture_of(points, NAMES[0]), tmp_path / "page.html", NAMES)
    text = (tmp_path / "page.html").read_text("utf-8")
    page = Page(text)
    assert not OBEYED.search(text.replace(r"\u", "")) and page.count["tbody"] == len(NAMES) and "_first" in page.text
