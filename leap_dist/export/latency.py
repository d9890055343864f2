"""Time of a forward pass: all variants interleaved in one run, the median of several, warm-up left out."""

from __future__ import annotations

import inspect
import random
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer, timer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Runner = Callable[[Mapping[str, Tensor]], Tensor]
"""Model inputs -> logits."""

MAX_ROUNDS = 50
CALLS = 3
"""Calls that `Timer` makes for one that it measures: two go before, so that each finds its own weights in the cache."""
BUDGET = 4.0
"""Seconds for all rounds of all variants at one setting; the first call of each comes before them."""
LONGEST = 30.0
"""Seconds of the first calls of all variants, above which a setting is not measured."""


def torch_runner(model: PreTrainedModel, last: bool = False) -> Runner:
    """Runs a model in eval mode, without autograd; `last`: a language model gives the logits of the last token alone.

    That is what it does for each new token of a text; with a large vocabulary all others take longer than all layers.
    """
    model.eval()
    options = {"logits_to_keep": 1} if last and keeps_logits(model) else {}

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.inference_mode():
            return logits_of(model(**inputs, **options))

    return run


def keeps_logits(model: PreTrainedModel) -> bool:
    """Whether the model can be asked for the logits of some tokens alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def logits_of(output: Any) -> Tensor:
    """The answer of a transformers model: its logits, and without a head its last hidden states.

    Of span models start and end, side by side in a last dimension.
    """
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    answer: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return answer


def medians(
    runners: Mapping[str, Runner],
    inputs: Mapping[str, Tensor],
    budget: float = BUDGET,
    clock: Callable[[], float] = timer,
) -> dict[str, float]:
    """Milliseconds of a call by name; torch's Timer measures, whose own clock waits for a GPU.

    Every round measures each runner once, in another order, so that slow spells and neighbours hit them all alike. A
    round that would go beyond `budget` (seconds) is not begun; without any the first calls count, cold as they are.
    """
    order, threads = random.Random(0), torch.get_num_threads()
    seconds: dict[str, list[float]] = {}
    for name, run in runners.items():
        before = clock()
        run(inputs)
        seconds[name] = [clock() - before]
    timers = {
        name: Timer("run(inputs)", globals={"run": run, "inputs": inputs}, num_threads=threads, timer=clock)
        for name, run in runners.items()
    }
    started = clock()
    for _ in range(MAX_ROUNDS):
        if clock() - started + CALLS * sum(values[-1] for values in seconds.values()) > budget:
            break
        for name, measured in order.sample(list(timers.items()), len(timers)):
            seconds[name].append(measured.timeit(1).median)
    return {name: 1e3 * statistics.median(values[1:] or values) for name, values in seconds.items()}


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
