"""How fast an export is beside the dense model, as its card says it."""

from __future__ import annotations

from collections.abc import Sequence

from leap_dist.export import onnx
from leap_dist.export.card import Latency
from leap_dist.export.latency import CALLS, LONGEST, Runner, keeps_logits, medians, torch_runner
from leap_dist.export.shrunk import Models
from leap_dist.export.sparse import BLOCKS, describe_blocks, measure_blocks

BATCHES = (1, 32)


def latency_work(length: int, batch: int) -> float:
    """Tokens that go through a model for one measurement."""
    return 2 * (1 + CALLS) * length * batch


def latencies(
    models: Models, runner: Runner | None, engine: str, threads: int, batches: Sequence[int] = BATCHES
) -> tuple[list[Latency], list[str]]:
    """At every batch size, and what was not measured because a call takes too long.

    Of a language model the last logits alone, where the export can give them alone.
    """
    found: list[Latency] = []
    if runner is None:
        return found, []
    last = engine != "onnxruntime"
    runners = {"before": torch_runner(models.dense, last), "after": runner}
    for batch in batches:
        seconds = sum(time.before + time.after for time in found[-1:]) / 1e3 * batch
        if seconds > LONGEST:
            return found, [
                f"Latency at batch {batch} is not measured: a call of each would take about {seconds:.0f} s."
            ]
        models.say(f"measuring latency at batch {batch}", latency_work(models.length, batch))
        times = medians(runners, onnx.model_inputs(models.masked, batch, models.length))
        found.append(Latency(engine, threads, batch, models.length, times["before"], times["after"]))
    if keeps_logits(models.masked):
        which = "the last token alone, as in generation" if last else "all tokens"
        return found, [f"Latency with the logits of {which}."]
    return found, []


def block_notes(models: Models) -> list[str]:
    """How torch's block-sparse product does on the blocks that were pruned, where it has kernels for them."""
    notes = []
    for block in BLOCKS:
        name = f"block:{block[0]}x{block[1]}"
        names = [t for gate in models.run.certificate.gates if gate.granularity == name for t in gate.tensors]
        if times := measure_blocks(models.masked, names, block, models.length):
            notes.append(describe_blocks(times, block, models.length))
    return notes
