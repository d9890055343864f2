"""The inference benchmark of a run: dense, masked and shrunk, in torch and onnxruntime, interleaved."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leap_dist.export import onnx
from leap_dist.export.flops import Flops, count_flops
from leap_dist.export.latency import Runner, medians, torch_runner, torch_threads
from leap_dist.export.shrunk import Models, max_length
from leap_dist.machine import machine
from leap_dist.models.shrink import example_inputs
from leap_dist.run_folder import Run

BATCHES, LENGTHS = (1, 32), (32, 128)


@dataclass(frozen=True)
class InferenceTime:
    """Median milliseconds of one variant at one setting. Ratios are to the dense model in the same engine."""

    variant: str
    engine: str
    threads: int
    batch: int
    length: int
    ms: float
    speed_up: float
    flops_ratio: float

    @property
    def quotient(self) -> float:
        """Speed-up / ratio of FLOPs: 1 where all the saved products are saved time."""
        return self.speed_up / self.flops_ratio


def bench_inference(
    run: Run,
    threads: Sequence[int],
    batches: Sequence[int] = BATCHES,
    lengths: Sequence[int] = LENGTHS,
) -> dict[str, Any]:
    """Measure all variants; returns machine, notes and one dict a measurement, JSON-able.

    RuntimeError, before anything is measured, if the shrunk model or a file for onnxruntime computes something else
    than the masked model. Lengths are cut to what the model takes; onnxruntime is left out where it is not installed.
    """
    where, models = machine(), Models(run)
    named = {"dense": models.dense, "hf": models.masked, "shrunk": models.shrunk}
    sizes = sorted({min(length, max_length(models.masked)) for length in lengths})
    missing = onnx.missing_libraries()
    notes = [f"without onnxruntime: {', '.join(missing)} not installed"] if missing else []
    found: list[InferenceTime] = []
    with tempfile.TemporaryDirectory() as scratch:
        files = {} if missing else {name: Path(scratch) / name / onnx.FILE for name in ("dense", "shrunk")}
        for name, path in files.items():
            path.parent.mkdir()
            onnx.save_onnx(named[name], path, sizes[-1])
        for count in threads:
            runners: dict[tuple[str, str], Runner] = {(name, "torch"): torch_runner(m) for name, m in named.items()}
            runners |= {(name, "onnxruntime"): onnx.onnx_runner(path, count) for name, path in files.items()}
            for length in sizes:
                flops = {name: count_flops(m, example_inputs(models.masked, 1, length)) for name, m in named.items()}
                for batch in batches:
                    inputs = onnx.model_inputs(models.masked, batch, length)
                    with torch_threads(count):
                        times = medians({"|".join(key): run for key, run in runners.items()}, inputs)
                    found += _ratios(times, flops, count, batch, length)
    rows = [asdict(time) | {"quotient": time.quotient} for time in found]
    return {"machine": where, "logit_difference": models.difference, "notes": notes, "times": rows}


def _ratios(
    times: Mapping[str, float], flops: Mapping[str, Flops], threads: int, batch: int, length: int
) -> list[InferenceTime]:
    rows = []
    for key, ms in times.items():
        variant, engine = key.split("|")
        speed_up, ratio = times[f"dense|{engine}"] / ms, flops["dense"].total / flops[variant].total
        rows.append(InferenceTime(variant, engine, threads, batch, length, ms, speed_up, ratio))
    return rows
