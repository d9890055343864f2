"""The cost of an exact selection: ours, cold and with the last cut at hand, against what torch offers.

One gate on one rank, on torch's default device. Between two rounds the scores drift as they do between two steps of
training. Every mask is compared, bit for bit, with the one that the baselines' cut gives, ties to the lowest index.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leap_dist.bench.jumps import bench_jumps
from leap_dist.core.communicator import Communicator
from leap_dist.core.digits import ScoreRuns
from leap_dist.core.select import Selector
from leap_dist.machine import machine, wait_for_device

SIZES = (10**4, 10**5, 10**6, 10**7, 10**8)
KEEP = 0.2  # part of the scores that is kept
DRIFT = 1e-3  # how far a score moves between two rounds, to the spread of all scores: both standard deviations
SETTLED = 5  # selections after which a bracket follows the cut
MOST_SECONDS = 60.0  # what would take longer is left out
BUDGET, MAX_ROUNDS = 10.0, 9  # seconds and rounds at one size
LEAST_JUMP = 10**6  # scores from which on jumps of the level are measured
BYTES = 64  # that one score takes at most while it is sorted or selected
WARM, COLD = "warm", "cold"

Cut = Callable[[Tensor, int], Tensor]
BASELINES: dict[str, Cut] = {
    "sort": lambda scores, keep: torch.sort(scores, descending=True).values[keep - 1],
    "topk": lambda scores, keep: torch.topk(scores, keep, sorted=False).values.min(),
    "kthvalue": lambda scores, keep: torch.kthvalue(scores, scores.numel() - keep + 1).values,
}
"""The keep-th largest score."""


def bench_select(sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Median milliseconds by size and method, how often the warm selection fits into a sort, and jumps; JSON-able.

    RuntimeError if a mask is not the one that a baseline's cut gives. Methods that would take too long or too much
    memory are left out, and `notes` says so.
    """
    where, notes, rows = machine(), [], []
    expected = dict.fromkeys((*BASELINES, COLD, WARM), 0.0)  # seconds by method, from the size before
    before = 1
    for size in sizes:
        reasons = {name: _too_much(size, seconds * size / before) for name, seconds in expected.items()}
        notes += [f"without {name} at {size:.0e} scores: {reason}" for name, reason in reasons.items() if reason]
        seconds = measure(size, [name for name, reason in reasons.items() if not reason])
        expected |= seconds
        before = size
        rows.append(_row(size, seconds))
    jumps = bench_jumps([size for size in sizes if size >= LEAST_JUMP and not _too_much(size, 0.0)])
    threads = torch.get_num_threads()
    return {"machine": where, "threads": threads, "keep": KEEP, "notes": notes, "sizes": rows, "jumps": jumps}


def _row(size: int, seconds: dict[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"scores": size} | {name: 1e3 * value for name, value in seconds.items()}
    if "sort" in seconds and WARM in seconds:
        row["sort / warm"] = seconds["sort"] / seconds[WARM]
    return row


def measure(size: int, methods: Iterable[str]) -> dict[str, float]:
    """Median seconds of the given methods, in turn, each from scores to a mask."""
    torch.manual_seed(0)
    scores, keep = torch.randn(size), math.ceil(KEEP * size)
    selector = new_selector(size)
    timed = {name: _method(name, selector, size, keep) for name in methods}
    for _ in range(SETTLED if WARM in timed else 0):
        _drift(scores)
        select(selector, scores, keep)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    started = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done and time.perf_counter() - started > BUDGET:
            break
        _drift(scores)
        expected: Tensor | None = None
        for name, method in timed.items():
            wait_for_device()
            before = time.perf_counter()
            cut, mask = method(scores)
            wait_for_device()
            seconds[name].append(time.perf_counter() - before)
            if cut is not None:
                mask = exact_mask(scores, cut, keep)
            expected = mask if expected is None else expected
            if not torch.equal(mask, expected):
                raise RuntimeError(f"{name} selects others of {size} scores than {next(iter(timed))}")
    return {name: statistics.median(values) for name, values in seconds.items()}


def _method(name: str, warm: Selector, size: int, keep: int) -> Callable[[Tensor], tuple[Tensor | None, Tensor]]:
    """Scores -> (cut, mask); a baseline's mask leaves ties at the cut as they are, ours gives no cut."""
    if name in BASELINES:

        def run(scores: Tensor) -> tuple[Tensor | None, Tensor]:
            cut = BASELINES[name](scores, keep)
            return cut, scores >= cut

        return run
    return lambda scores: (None, select(warm if name == WARM else new_selector(size), scores, keep))


def new_selector(size: int) -> Selector:
    """A selector of one gate that has seen no scores."""
    return Selector([size], [0], Communicator(), torch.get_default_device())


def select(selector: Selector, scores: Tensor, keep: int) -> Tensor:
    """The mask of the `keep` largest scores, as the optimizer makes it."""
    mask = torch.empty_like(scores, dtype=torch.bool)
    table = torch.tensor([[0, scores.numel(), 0, 0]])
    selector.masks_([ScoreRuns(scores, mask, table)], [keep])
    return mask


def exact_mask(scores: Tensor, cut: Tensor, keep: int) -> Tensor:
    """The mask of the `keep` largest scores, ties at the cut to the lowest index."""
    mask = scores > cut
    ties = (scores == cut).nonzero().flatten()[: keep - int(mask.count_nonzero())]
    mask[ties] = True
    return mask


def _drift(scores: Tensor) -> None:
    """Move all scores a little, in place."""
    for part in scores.split(10**7):
        part.add_(torch.randn(part.numel()), alpha=DRIFT)


def _too_much(size: int, seconds: float) -> str | None:
    """Why a method is left out at this size."""
    if seconds > MOST_SECONDS:
        return f"about {seconds:.0f} s, more than {MOST_SECONDS:.0f}"
    free = free_memory()
    if free is not None and size * BYTES > free:
        return f"up to {size * BYTES / 1e9:.1f} GB, and {free / 1e9:.1f} are free"
    return None


def free_memory() -> int | None:
    """Bytes that may still be taken of the GPU in use, or by a process where Linux says so."""
    if torch.get_default_device().type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
