"""What an exact selection takes when the level jumps, against one from step to step: time, and memory at its peak.

Many gates on one rank, as in a decoder. A jump moves the kept share of every gate by 0.4; what is cold has seen no
scores. Every mask is checked: the count of each gate, and that no score left out is above one that is kept.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from leap_dist.core.communicator import Communicator
from leap_dist.core.digits import ScoreRuns
from leap_dist.core.select import Selector
from leap_dist.machine import wait_for_device

NUM_GATES = 126  # the linear matrices of a decoder with 18 layers
LOW, HIGH = 0.2, 0.6  # kept shares between which the level jumps
SETTLED, ROUNDS = 5, 3  # selections after which a bracket follows the cut; measurements of each kind
DRIFT = 1e-3  # how far a score moves between two selections, to the spread of all scores
SCORES: dict[str, Callable[[int], Tensor]] = {
    "normal": torch.randn,
    "equal": torch.ones,
    "sorted": lambda num: torch.linspace(-1.0, 1.0, num),
}
"""Scores by their name; all but the normal ones stand still."""


def bench_jumps(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each size and kind of scores: warm milliseconds, ratios to them, bytes a score at the peak."""
    return [measure(size, kind) for size in sizes for kind in SCORES]


def measure(size: int, kind: str) -> dict[str, Any]:
    """Medians of ROUNDS, one row. RuntimeError if a mask is wrong."""
    torch.manual_seed(0)
    gates = _Gates(SCORES[kind](size // NUM_GATES * NUM_GATES), drift=kind == "normal")
    cold = [gates.seconds(LOW, cold=True) for _ in range(ROUNDS)]
    warm, down, up = [], [], []
    for _ in range(ROUNDS):
        warm.append(gates.settle(LOW))
        up.append(gates.seconds(HIGH))
        gates.settle(HIGH)
        down.append(gates.seconds(LOW))
    step = statistics.median(warm)
    ratios = {"cold": cold, f"to {HIGH}": up, f"to {LOW}": down}
    held = max(gates.held(LOW, cold=True), gates.held(HIGH), gates.held(LOW))
    return (
        {"scores": size, "kind": kind, "warm": 1e3 * step}
        | {f"{name} / warm": statistics.median(values) / step for name, values in ratios.items()}
        | {"peak bytes / score": held / size}
    )


class _Gates:
    """NUM_GATES gates of one size on one rank, side by side in one buffer."""

    def __init__(self, scores: Tensor, drift: bool) -> None:
        self._scores, self._drift = scores, drift
        self._size = len(scores) // NUM_GATES
        table = torch.tensor([[gate * self._size, self._size, gate, gate] for gate in range(NUM_GATES)])
        self._run = ScoreRuns(scores, torch.ones_like(scores, dtype=torch.bool), table)
        self._selector = self._new()

    def _new(self) -> Selector:
        device = torch.get_default_device()
        return Selector([self._size] * NUM_GATES, list(range(NUM_GATES)), Communicator(), device)

    def _select(self, share: float, cold: bool) -> Callable[[], None]:
        if cold:
            self._selector = self._new()
        if self._drift:
            for part in self._scores.split(10**7):
                part.add_(torch.randn(part.numel()), alpha=DRIFT)
        return lambda: self._selector.masks_([self._run], [int(share * self._size)] * NUM_GATES)

    def seconds(self, share: float, cold: bool = False) -> float:
        """Of one selection, whose masks are checked."""
        select = self._select(share, cold)
        wait_for_device()
        before = time.perf_counter()
        select()
        wait_for_device()
        passed = time.perf_counter() - before
        self._check(int(share * self._size))
        return passed

    def settle(self, share: float) -> float:
        """Seconds of a selection after SETTLED at the same share."""
        return [self.seconds(share) for _ in range(SETTLED)][-1]

    def held(self, share: float, cold: bool = False) -> int:
        """Bytes that a selection takes at its peak, beside scores and masks."""
        return most_held(self._select(share, cold))

    def _check(self, keep: int) -> None:
        for scores, mask in zip(self._scores.split(self._size), self._run.mask.split(self._size), strict=True):
            kept, rest = scores[mask], scores[~mask]
            if len(kept) != keep or (len(rest) and kept.min() < rest.max()):
                raise RuntimeError(f"a selection of {keep} of {self._size} scores took {len(kept)}, or not the best")


def most_held(run: Callable[[], None]) -> int:
    """The most bytes of torch's memory that a call held at one time, beside what there was before."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))
