"""The inference benchmark of a run: dense, masked and shrunk, in torch and onnxruntime, interleaved."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_dist.export import onnx
from leap_dist.export.latency import LONGEST, Runner, keeps_logits, medians, torch_runner, torch_threads
from leap_dist.export.shrunk import Models
from leap_dist.export.time_left import TimeLeft
from leap_dist.machine import machine
from leap_dist.models.flops import Flops, count_flops, max_length
from leap_dist.models.outputs import example_inputs
from leap_dist.run_folder import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    than the masked model. Lengths are cut to what the model takes; onnxruntime is left out where it is not installed,
    and so are settings of which a call would take too long. Of a language model torch computes the last logits alone.
    """
    where, models = machine(), Models(run)
    named = {"dense": models.dense, "hf": models.masked, "shrunk": models.shrunk}
    sizes = sorted({min(length, max_length(models.masked)) for length in lengths})
    missing = onnx.missing_libraries()
    notes = [f"without onnxruntime: {', '.join(missing)} not installed"] if missing else []
    if keeps_logits(models.masked):
        notes.append("torch computes the logits of the last token alone, onnxruntime those of all tokens")
    found: list[InferenceTime] = []
    settings = [(count, length, batch) for count in threads for length in sizes for batch in sorted(batches)]
    progress = TimeLeft(sum(batch * length for _, length, batch in settings))
    with tempfile.TemporaryDirectory() as scratch:
        files = {} if missing else {name: Path(scratch) / name / onnx.FILE for name in ("dense", "shrunk")}
        for name, path in files.items():
            path.parent.mkdir()
            onnx.save_onnx(named[name], path, sizes[-1])
        for count, length, batch in settings:
            setting = f"{count} thread{'s' * (count > 1)}, batch {batch}, length {length}"
            progress.begin(setting, batch * length)
            known = [time for time in found if time.threads == count]
            if (seconds := _expected(known, batch * length)) > LONGEST:
                notes.append(f"not measured: {setting}: one call of each would take about {seconds:.0f} s")
                continue
            runners: dict[tuple[str, str], Runner] = {
                (name, "torch"): torch_runner(model, last=True) for name, model in named.items()
            }
            runners |= {(name, "onnxruntime"): onnx.onnx_runner(path, count) for name, path in files.items()}
            with torch_threads(count):
                flops = {key: _flops(named[key[0]], key[1], length) for key in runners}
                times = medians(
                    {"|".join(key): run for key, run in runners.items()},
                    onnx.model_inputs(models.masked, batch, length),
                )
            found += _ratios(times, flops, count, batch, length)
    rows = [asdict(time) | {"quotient": time.quotient} for time in found]
    return {"machine": where, "logit_difference": models.difference, "notes": notes, "times": rows}


def _flops(model: PreTrainedModel, engine: str, length: int) -> Flops:
    """Of what the engine computes: torch the last logits alone."""
    last = {"logits_to_keep": 1} if engine == "torch" and keeps_logits(model) else {}
    return count_flops(model, example_inputs(model, 1, length), **last)


def _expected(times: Sequence[InferenceTime], tokens: int) -> float:
    """Seconds of one call of each variant with so many tokens, by the largest setting that was measured."""
    most = max((time.batch * time.length for time in times), default=1)
    return sum(time.ms for time in times if time.batch * time.length == most) / 1e3 * tokens / most


def _ratios(
    times: Mapping[str, float], flops: Mapping[tuple[str, str], Flops], threads: int, batch: int, length: int
) -> list[InferenceTime]:
    rows = []
    for key, ms in times.items():
        variant, engine = key.split("|")
        speed_up, ratio = times[f"dense|{engine}"] / ms, flops["dense", engine].total / flops[variant, engine].total
        rows.append(InferenceTime(variant, engine, threads, batch, length, ms, speed_up, ratio))
    return rows
