"""How fast a run goes, and what memory it takes: measured between two logged steps."""

from __future__ import annotations

import resource
import time

import torch
from torch import Tensor

from leap_dist.zero.ranks import Ranks

RATES = ("steps_per_second", "tokens_per_second", "memory_mb", "cuda_memory_mb")
"""Keys of what differs between equal runs."""


class Meter:
    """Counts what the ranks work through; nothing is asked of a device until `read`."""

    def __init__(self, ranks: Ranks, step: int) -> None:
        self._ranks = ranks
        self._step, self._tokens, self._since = step, 0, time.perf_counter()

    def count(self, batch: dict[str, Tensor]) -> None:
        """Take note of a micro-batch."""
        self._tokens += batch["input_ids"].numel()

    def read(self, step: int) -> dict[str, float]:
        """Rates since the last call, over all ranks, padding counted; the most memory that a rank took so far.

        Memory: MB resident on the first rank, and MB of tensors on its GPU. Collective.
        """
        passed = time.perf_counter() - self._since
        tokens = self._ranks.mean(torch.tensor(float(self._tokens))).item() * self._ranks.world_size
        found = {"steps_per_second": (step - self._step) / passed, "tokens_per_second": tokens / passed}
        found["memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # Linux counts KiB
        if self._ranks.device.type == "cuda":
            found["cuda_memory_mb"] = torch.cuda.max_memory_allocated(self._ranks.device) / 1e6
        self._step, self._tokens, self._since = step, 0, time.perf_counter()
        return found
