"""Stopping trials that are clearly behind, by asynchronous successive halving with one rung (ASHA, arXiv 1810.05934).

The rung is where the settle phase begins: the model is pruned to its exact target then, and how good it is can be
measured. Trials are compared with those of the same target alone: a smaller model is no worse for being smaller.
"""

from __future__ import annotations

import math
from threading import Lock

REDUCTION = 2  # one of so many continues


class Halving:
    """Decides as trials come up: one continues if it is among the best 1/REDUCTION of those seen with its target.

    A verdict stands: a trial that comes to the rung a second time, after it was cut off, gets the one it had.
    """

    def __init__(self, higher_is_better: bool) -> None:
        self._sign = 1.0 if higher_is_better else -1.0
        self._seen: dict[float, dict[str, float]] = {}
        self._verdicts: dict[str, bool] = {}
        self._lock = Lock()

    def note(self, trial: str, target: float, value: float, verdict: bool) -> None:
        """A verdict of an earlier call. A value that is no number is worse than all others."""
        with self._lock:
            self._seen.setdefault(target, {})[trial] = -math.inf if math.isnan(value) else self._sign * value
            self._verdicts[trial] = verdict

    def verdict(self, trial: str) -> bool | None:
        """The verdict that a trial has got; None before it has one."""
        return self._verdicts.get(trial)

    def judge(self, trial: str, target: float, value: float) -> bool:
        """The verdict; the first trial of a target always continues."""
        if (before := self.verdict(trial)) is not None:
            return before
        self.note(trial, target, value, True)
        with self._lock:
            seen = self._seen[target]
            better = sum(other > seen[trial] for other in seen.values())
            self._verdicts[trial] = better < max(1, len(seen) // REDUCTION)
            return self._verdicts[trial]
