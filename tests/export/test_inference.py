"""The inference benchmark: every variant at every setting, and nothing at all where answers differ."""

from __future__ import annotations

import json

import pytest

from leap_dist.export import inference, latency, onnx, shrunk
from leap_dist.export.inference import bench_inference
from leap_dist.run_folder import Run, read_run
from tests.export.runs import classifier, make_run, structure_masks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    model = classifier()
    return read_run(make_run(tmp_path_factory.mktemp("runs") / "run", model, structure_masks(model), "head"))


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "MAX_ROUNDS", 1)


@pytest.mark.long
@pytest.mark.skipif(bool(onnx.missing_libraries()), reason="needs the onnx extra")
def test_every_variant_at_every_setting(run: Run) -> None:
    result = bench_inference(run, threads=[1, 2], batches=[2], lengths=[4, 99, 128])
    assert json.loads(json.dumps(result)) == result
    found = {(t["variant"], t["engine"], t["threads"], t["batch"], t["length"]): t for t in result["times"]}
    variants = {("dense", "torch"), ("hf", "torch"), ("shrunk", "torch")}
    variants |= {("dense", "onnxruntime"), ("shrunk", "onnxruntime")}
    settings = {(threads, batch, length) for threads in (1, 2) for batch in (2,) for length in (4, 16)}
    assert set(found) == {(*variant, *setting) for variant in variants for setting in settings}
    for (variant, engine, *setting), time in found.items():
        dense = found["dense", engine, *setting]
        assert time["speed_up"] == dense["ms"] / time["ms"]
        assert time["quotient"] == time["speed_up"] / time["flops_ratio"]
        assert (time["flops_ratio"] > 1) == (variant == "shrunk")
    assert result["logit_difference"] < 1e-5 and result["machine"]["versions"]["torch"] and not result["notes"]


def test_without_onnxruntime_torch_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnxruntime" else name)
    result = bench_inference(run, threads=[1], batches=[1], lengths=[4])
    assert {time["engine"] for time in result["times"]} == {"torch"}
    assert result["notes"] == ["without onnxruntime: onnxruntime not installed"]


def test_nothing_is_measured_where_answers_differ(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrunk, "logit_difference", lambda *_: 2e-5)
    monkeypatch.setattr(inference, "medians", lambda *_: pytest.fail("measured all the same"))
    with pytest.raises(RuntimeError, match=r"differ from the masked one's by 2e-05 of the largest, allowed 1e-05"):
        bench_inference(run, threads=[1])


def test_a_setting_that_would_take_too_long_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnxruntime" else name)
    monkeypatch.setattr(inference, "LONGEST", 1e-6)
    result = bench_inference(run, threads=[1, 2], batches=[4, 1], lengths=[4])
    assert [(time["threads"], time["batch"]) for time in result["times"]] == [(1, 1)] * 3 + [(2, 1)] * 3
    assert [note[:42] for note in result["notes"][1:]] == [
        "not measured: 1 thread, batch 4, length 4:",
        "not measured: 2 threads, batch 4, length 4",
    ]
