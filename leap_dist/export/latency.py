"""Time of a forward pass: all variants interleaved in one run, the median of several, warm-up left out."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Runner = Callable[[Mapping[str, Tensor]], Tensor]
"""Model inputs -> logits."""

MIN_ROUNDS, MAX_ROUNDS = 5, 50
BUDGET = 4.0  # seconds for all rounds of all variants, once there are MIN_ROUNDS


def torch_runner(model: PreTrainedModel) -> Runner:
    """Runs a model in eval mode, without autograd."""
    model.eval()

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.inference_mode():
            return logits_of(model(**inputs))

    return run


def logits_of(output: Any) -> Tensor:
    """The answer of a transformers model; of span models start and end, side by side in a last dimension."""
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    logits: Tensor = output.logits
    return logits


def medians(runners: Mapping[str, Runner], inputs: Mapping[str, Tensor], budget: float = BUDGET) -> dict[str, float]:
    """Milliseconds of a call by name.

    Every round measures each runner once, in another order, so that slow spells and neighbours hit them all alike; a
    call that is not measured goes before, so that each finds its own weights in the cache.
    """
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in runners}
    for run in runners.values():
        run(inputs)
    started = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - started > budget:
            break
        for name, run in order.sample(list(runners.items()), len(runners)):
            run(inputs)
            before = time.perf_counter()
            run(inputs)
            times[name].append(1e3 * (time.perf_counter() - before))
    return {name: statistics.median(values) for name, values in times.items()}


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
