"""Files that anybody may have made: whatever stands in the place of one is one message, soon and in little memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from leap_dist.config.json_file import read_json
from leap_dist.errors import UserError


@pytest.fixture(autouse=True)
def _soon() -> Iterator[None]:
    """Fails what waits for a pipe."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def link_to(target: str) -> Callable[[Path], None]:
    def make(file: Path) -> None:
        file.unlink(missing_ok=True)
        file.symlink_to(target)

    return make


def folder(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


def huge(file: Path) -> None:
    with file.open("ab") as stream:
        stream.truncate(2**40)


def text(content: str | bytes) -> Callable[[Path], None]:
    def make(file: Path) -> None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (pipe, "is not a regular file"),
        (folder, "cannot be read: Is a directory"),
        (link_to("/dev/zero"), "is not a regular file"),
        (link_to("a.json"), "cannot be read: Too many levels of symbolic links"),
        (huge, r"has 1099511627776 bytes; allowed: at most 16777216"),
        (text(""), "not JSON: line 1, column 1: "),
        (text('{"a": 1'), "not JSON: line 1, column 8: "),
        (text('{"a": 1}'.encode("utf-16")), "not UTF-8 text: "),
        (text("[" * 100_000), "lists or objects are nested too deeply"),
        (text('{"a":' * 100_000), "lists or objects are nested too deeply"),
        (text("[1]"), r"got \[1\]; allowed: a JSON object"),
        (text('{"a": 1, "a": 2}'), "the same key is given twice: a; keep one"),
        (text('{"a": {"b": 1, "b": 1}}'), "the same key is given twice: b; keep one"),
        (text(f'{{"a": {2**63}}}'), "got 9223372036854775808; allowed: integers of 64 bits"),
        (text(f'{{"a": -{"9" * 10_000_000}}}'), r"got -9{196}\.\.\.; allowed: integers of 64 bits"),
        (text('{"a": NaN}'), "NaN is not JSON; allowed: a finite number"),
        (text('{"a": 1e999}'), "1e999 is not JSON; allowed: a finite number"),
    ],
)
def test_what_is_no_json_object_is_one_message(tmp_path: Path, make: Callable[[Path], None], problem: str) -> None:
    make(tmp_path / "a.json")
    with pytest.raises(UserError, match=rf"^{tmp_path}/a\.json: {problem}"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=rf"^{tmp_path}/a\.json: damaged: {problem}.*; mend it$"):
        read_json(tmp_path / "a.json", "mend it")


def test_what_editors_and_systems_add_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{\r\n"a": -9223372036854775808, "b": 1e308}\r\n')
    assert read_json(tmp_path / "a.json") == {"a": -(2**63), "b": 1e308}
    (tmp_path / "a.json").write_text('{"a": [Infinity, -Infinity, 1e999]}')
    assert read_json(tmp_path / "a.json", finite=False) == {"a": [float("inf"), float("-inf"), float("inf")]}
    (tmp_path / "b.json").symlink_to(tmp_path / "a.json")
    assert read_json(tmp_path / "b.json", finite=False)["a"][0] > 0


# ------------------------------------------------------------------------------ everything that reads such a file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an export, a sweep's files and a journal."""
    from leap_dist.tracking.journal import Journal
    from tests.tracking.folders import export_card, run_folder

    run = run_folder(tmp_path_factory.mktemp("runs") / "run")
    export_card(run, "shrunk", 3.0)
    journal = Journal(run)
    journal.describe(uri="sqlite:////nowhere/x.db", experiment="x", name="x", parent=None, run_id="0" * 32)
    journal.add("metrics", time=1, step=1, values={"loss": 1.0})
    journal.close(remove=False)
    (run / "sweep.json").write_text(json.dumps({"identity": {"a": "b"}}))
    ended = {"trial": "a", "kind": "done", "seconds": 1.0, "error": "", "metrics": {"accuracy": 0.5}}
    (run / "trials.jsonl").write_text(json.dumps(ended) + "\n")
    judged = {"trial": "a", "rung": 1, "target": 0.5, "metrics": {"accuracy": 0.5}, "goes_on": True}
    (run / "rungs.jsonl").write_text(json.dumps(judged) + "\n")
    return run


def read_page(run: Path) -> None:
    from leap_dist.run_folder import read_files
    from leap_dist.tracking.report import run_page

    run_page(read_files(run))


def read_journal(run: Path) -> None:
    from leap_dist.tracking.mlflow import sync

    sync(run, None)


def read_sweep(run: Path) -> None:
    from leap_dist.sweep.run import _check_folder

    _check_folder(run, {"a": "b"}, False)


def read_trials(run: Path) -> None:
    from leap_dist.sweep.line import ENDED, Ended, _read_lines

    _read_lines(run / ENDED, Ended)


def read_rungs(run: Path) -> None:
    from leap_dist.sweep.line import JUDGED, Judged, _read_lines

    _read_lines(run / JUDGED, Judged)


READERS = {
    "certificate.json": read_page,
    "config.json": read_page,
    "scores.json": read_page,
    "metrics.jsonl": read_page,
    "export/shrunk/card.json": read_page,
    "mlflow.jsonl": read_journal,
    "sweep.json": read_sweep,
    "trials.jsonl": read_trials,
    "rungs.jsonl": read_rungs,
}
EDITS = [None, "x", {"a": 1}, 2**62, float("nan")]


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_every_reader_refuses_what_is_no_file_of_ours(finished: Path, tmp_path: Path, name: str) -> None:
    makes = [
        huge,
        text(b"\xff\xfe\x00"),
        text("[" * 100_000 + "\n"),
        text('{"a": 1, "a": 2}\n'),
        text("5\n"),
        text('{"a": ' + "9" * 5000 + "}\n"),
    ]
    makes += [pipe] if name in ("metrics.jsonl", "mlflow.jsonl") else []  # others are taken for missing
    for number, make in enumerate(makes):
        run = Path(shutil.copytree(finished, tmp_path / str(number)))
        make(run / name)
        if (
            name in ("trials.jsonl", "rungs.jsonl") and make is not huge and number not in (1, 4)
        ):  # a line that is no JSON was cut off
            READERS[name](run)
            continue
        with pytest.raises(
            UserError,
            match="--sync: " if name == "mlflow.jsonl" and number == 1 else Path(name).name.replace(".", r"\."),
        ):
            READERS[name](run)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_value_of_another_kind_is_one_message_or_does_not_matter(finished: Path, tmp_path: Path, name: str) -> None:
    """Each of a file's values, and of those inside the first, in turn."""
    from leap_dist.run_folder import sealed

    run = Path(shutil.copytree(finished, tmp_path / "run"))
    first, _, rest = (finished / name).read_text().partition("\n" if name.endswith("l") else "\0")
    refused = 0
    for path in list(places(json.loads(first))):
        for value in EDITS:
            content = json.loads(first)
            inner = content
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            content = sealed(content) if "sha256" in content else content
            (run / name).write_text(json.dumps(content) + "\n" + rest)
            try:
                READERS[name](run)
            except UserError:
                refused += 1
    assert refused >= 5


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for number, (key, inner) in enumerate(items):
        if number < (3 if path else 20):
            yield (*path, key)
            if len(path) < 3:
                yield from places(inner, (*path, key))
