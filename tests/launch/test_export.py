"""launch/export.py and launch/bench.py as a user starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from leap_dist.export import latency
from tests.disks import fill, free
from tests.export.runs import classifier, make_run, structure_masks
from tests.launch.scripts import load_script

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = classifier()
    return make_run(tmp_path_factory.mktemp("runs") / "run", model, structure_masks(model), "head")


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "MAX_ROUNDS", 1)


def launch(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> int:
    """Run a launcher in this process; its exit code."""
    module = load_script(script)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    code: int = module.main()
    return code


def test_an_export_ends_with_a_table(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["--to", "shrunk,mask", "--output", str(output), "--threads", "1"]
    assert launch(monkeypatch, "export", str(run), *arguments) == 0
    assert sorted(path.name for path in output.iterdir()) == ["mask", "shrunk"]
    shown = capsys.readouterr().out
    assert f"shrunk: {output / 'shrunk'}" in shown and f"mask: {output / 'mask'}" in shown
    assert "what loads it" in shown and "transformers AutoModel" in shown
    assert "dense → exported, 1 thread" in shown and "MFLOPs/token" in shown and "ms at 32x16" in shown


def test_a_model_without_a_head_and_kinds_given_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    classifier().bert.save_pretrained(tmp_path / "encoder")
    kinds = ["--to", "hf", "--to", "onnx,int8"]
    assert launch(monkeypatch, "export", str(tmp_path / "encoder"), *kinds, "--output", str(tmp_path / "out")) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["hf", "int8", "onnx"]
    for kind in ("onnx", "int8"):
        (file,) = (tmp_path / "out" / kind).glob("*.onnx")
        (answer,) = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).get_outputs()
        assert answer.name == "last_hidden_state" and answer.shape[-1] == 32


def test_no_latency(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(monkeypatch, "export", str(run), "--to", "shrunk", "--output", str(tmp_path), "--no-latency") == 0
    shown = capsys.readouterr()
    assert "MFLOPs/token" in shown.out and "ms at" not in shown.out
    assert "shrunk: counting FLOPs (" in shown.err and "latency" not in shown.err


def test_exports_go_to_the_run_by_default(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch(monkeypatch, "export", str(run), "--to", "mask") == 0
    assert (run / "export" / "mask" / "card.json").is_file()
    assert "<td>mask</td>" in (run / "report.html").read_text("utf-8")
    assert launch(monkeypatch, "export", str(run), "--to", "mask") == 0  # an older export is replaced


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--to", "msak"],
            'error: --to: got "msak"; allowed: hf, shrunk, onnx, mask, semi_structured, gguf, gguf_q8_0, '
            "gguf_q4_k_m, int8, int8_torch; did you mean",
        ),
        (["--to", "hf", "--threads", "0"], "error: --threads: got 0; allowed: an integer >= 1"),
        (
            ["--to", "hf", "--vocabulary-size", "0"],
            "error: --vocabulary-size: needs --vocabulary TEXT, the texts whose",
        ),
        (["--to", "hf", "--held-out", "a.txt"], "error: --held-out: needs --vocabulary TEXT, the texts whose tokens"),
        (["--to", "semi_structured"], "error: --to semi_structured: the model is not 2:4 sparse"),
    ],
)
def test_a_mistake_is_one_message(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert launch(monkeypatch, "export", str(run), *arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(message) and shown.err.count("\n") == 1 and shown.out == ""


@pytest.mark.parametrize("kind", ["hf", "shrunk", "mask"])
def test_a_full_disk_is_one_message(
    kind: str, run: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = small_disk / "out"
    output.mkdir()
    fill(small_disk)
    assert launch(monkeypatch, "export", str(run), "--to", kind, "--output", str(output), "--no-latency") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: --output: {output / kind} cannot be written: ")
    assert len(last.replace(str(output), "")) < 200
    assert "No space left on device" in last
    assert last.endswith("; make room, or choose another folder with --output") and not list(output.iterdir())
    free(small_disk)
    assert launch(monkeypatch, "export", str(run), "--to", kind, "--output", str(output), "--no-latency") == 0


def test_a_page_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = classifier()
    run = make_run(tmp_path / "run", model, structure_masks(model), "head")
    (run / "report.html").mkdir()
    assert launch(monkeypatch, "export", str(run), "--to", "mask") == 0
    shown = capsys.readouterr()
    assert f"mask: {run / 'export' / 'mask'}" in shown.out
    last = shown.err.splitlines()[-1]
    assert last.startswith(f"warning: {run / 'report.html'} could not be written: [Errno 21] Is a directory")
    assert last.endswith("; the exports are complete; mend that, and run the same command again to make the page")
    (run / "report.html").rmdir()
    (run / "metrics.jsonl").write_text("{}\n")
    assert launch(monkeypatch, "export", str(run), "--to", "mask") == 0
    assert "metrics.jsonl:1: damaged: " in capsys.readouterr().err


def test_no_traceback_from_a_fresh_process(tmp_path: Path) -> None:
    for script, arguments in (("export.py", ["--to", "hf"]), ("bench.py", [])):
        command = [sys.executable, str(ROOT / "launch" / script), *(["inference"] if script == "bench.py" else [])]
        done = subprocess.run([*command, str(tmp_path), *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: RUN: got {tmp_path}; that folder is not a run") and done.stdout == ""


def test_bench_as_json_and_as_a_table(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from leap_dist.export import onnx

    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    assert launch(monkeypatch, "bench", "inference", str(run), "--threads", "1", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [time["variant"] for time in result["times"][:3]] == ["dense", "hf", "shrunk"]
    assert launch(monkeypatch, "bench", "inference", str(run), "--threads", "1") == 0
    shown = capsys.readouterr().out
    assert "cores" in shown and "torch 2." in shown and "commit " in shown and "flops_ratio" in shown
    assert "without onnxruntime: onnx, onnxscript, onnxruntime not installed" in shown
    assert launch(monkeypatch, "bench", "inference", str(run), "--threads", "1", "0") == 2
    assert capsys.readouterr().err == "error: --threads: got 0; allowed: an integer >= 1\n"
