"""An export that a signal ends: what is left, what is said, and what the next one finds."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from leap_dist import stopping
from leap_dist.errors import UserError
from leap_dist.export import kinds
from leap_dist.export.kinds import Exported, export_run
from leap_dist.export.shrunk import Models
from leap_dist.export.stop import Stopped, stoppable
from leap_dist.run_folder import Run, read_run
from leap_dist.stopping import HEEDED
from tests.export.runs import classifier, element_masks, make_run
from tests.launch.scripts import load_script


@pytest.fixture
def run(tmp_path: Path) -> Run:
    model = classifier()
    return read_run(make_run(tmp_path / "run", model, element_masks(model)))


@pytest.fixture(autouse=True)
def _unheeded() -> Iterator[None]:
    """A signal that the code does not heed ends the test, not the process."""

    def fail(*_: object) -> None:
        pytest.fail("a signal was not heeded")

    before = {number: signal.signal(number, fail) for number in HEEDED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.1)


@pytest.mark.parametrize("number", HEEDED)
@pytest.mark.parametrize(
    ("wanted", "said"),
    [("mask,hf", "mask written, which stays"), ("hf,mask", "nothing was written")],
)
def test_a_signal_ends_an_export_with_a_message(
    number: signal.Signals,
    wanted: str,
    said: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def killed(models: Models, folder: Path, threads: int) -> Exported:
        folder.mkdir()
        (folder / "half").touch()
        send(number)
        pytest.fail("went on")

    monkeypatch.setitem(kinds.KINDS, "hf", killed)
    output = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["export.py", str(run.folder), "--to", wanted, "--output", str(output)])
    assert load_script("export").main() == 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"stopped by {number.name}: {said}; the same command starts anew"
    assert [path.name for path in output.glob("*")] == ["mask"] * ("mask written" in said)
    assert output.exists() == ("mask written" in said)


def test_help_names_the_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["export.py", "--help"])
    with pytest.raises(SystemExit):
        load_script("export").main()
    assert "3 stopped by a signal" in " ".join(capsys.readouterr().out.split())


def test_signals_that_come_together_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "TOGETHER", 60.0)
    cleaned = False
    with pytest.raises(Stopped, match="SIGTERM"), stoppable():
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGINT)
            cleaned = True
    assert cleaned
    monkeypatch.setattr(stopping, "TOGETHER", 0.0)
    with pytest.raises(Stopped, match="SIGINT"), stoppable():
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGINT)


def test_what_a_killed_export_left_is_removed_by_the_next(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for name in (".onnx.partial", "..shrunk.partial.partial", ".vocabulary.x1.partial", "hers"):
        (output / name).mkdir(parents=True)
    (output / ".onnx.lock").touch()
    place = os.open(output, os.O_RDONLY)
    fcntl.flock(place, fcntl.LOCK_SH)  # another export is at work
    assert len(list(export_run(run, ["mask"], output, threads=1))) == 1
    assert (output / ".onnx.partial").is_dir()
    os.close(place)
    assert len(list(export_run(run, ["mask"], output, threads=1))) == 1
    assert sorted(path.name for path in output.iterdir()) == ["hers", "mask"]


@pytest.mark.parametrize("left", ["certificate.json", "config.json"])
def test_the_folder_of_another_run_is_refused(left: str, run: Run, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", classifier(), {})
    for name in {"certificate.json", "config.json"} - {left}:
        (other / name).unlink()
    before = sorted(other.iterdir())
    with pytest.raises(
        UserError, match=r"^--output: got .*other, which holds another run than .*run; allowed: .*export"
    ):
        list(export_run(run, ["mask"], other, threads=1))
    assert sorted(other.iterdir()) == before
    assert len(list(export_run(run, ["mask"], run.folder, threads=1))) == 1
