"""Stopping trials that are clearly behind, by asynchronous successive halving with one rung (ASHA, arXiv 1810.05934).

The rung is where the settle phase begins: the model is pruned to its exact target then, and how good it is can be
measured. Trials are compared with those of the same target alone: a smaller model is no worse for being smaller.
"""

from __future__ import annotations

from threading import Lock

REDUCTION = 2  # one of so many goes on


class Halving:
    """Decides as trials come up: one goes on if it is among the best 1/REDUCTION of those seen with its target."""

    def __init__(self, higher_is_better: bool) -> None:
        self._sign = 1.0 if higher_is_better else -1.0
        self._seen: dict[float, dict[str, float]] = {}
        self._lock = Lock()

    def note(self, trial: str, target: float, value: float) -> None:
        """A trial's value at the rung; the same trial may come again, after it was cut off."""
        with self._lock:
            self._seen.setdefault(target, {})[trial] = self._sign * value

    def goes_on(self, trial: str, target: float, value: float) -> bool:
        """The verdict; the first trial of a target always goes on."""
        self.note(trial, target, value)
        with self._lock:
            seen = self._seen[target]
            better = sum(other > seen[trial] for other in seen.values())
        return better < max(1, len(seen) // REDUCTION)
