"""Where the cut of a gate may lie, by a sample of its scores from all ranks: two with few others between."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from leap_dist.core.communicator import Communicator
from leap_dist.core.digits import HIGHEST, LOWEST, ScoreRuns
from leap_dist.ops.reference import GATE, LENGTH, OFFSET, PLACE, to_keys

SAMPLE, SHARE = 1 << 12, 8  # a gate is sampled with about so many scores, and 1 in so many where it has few
DEVIATIONS = 3.5  # of the cut's rank in the sample; the bracket reaches as far to either side


class Sampler:
    """Draws from every gate one score at random out of each `stride` neighbours: no order of scores is in step with it.

    Draws differ from call to call; no mask depends on them. fragment_gates: the gate of every place.
    """

    def __init__(
        self,
        num_units: Sequence[int],
        fragment_gates: Sequence[int],
        communicator: Communicator,
        device: torch.device,
    ) -> None:
        self._num_units, self._fragment_gates = list(num_units), list(fragment_gates)
        self._strides = [max(num // min(SAMPLE, max(num // SHARE, 1)), 1) for num in num_units]
        self._communicator, self._device = communicator, device
        self._generator = torch.Generator(device).manual_seed(0)

    def aim(self, runs: Sequence[ScoreRuns], keep: Mapping[int, int]) -> dict[int, tuple[int, int]]:
        """The lowest and highest key that are expected of the cuts of these gates. Two all-reduces if there are any."""
        if not keep:
            return {}
        drawn = dict(sample for run in runs for sample in self._draw(run, keep))
        counts = torch.zeros(len(self._fragment_gates), dtype=torch.int64, device=self._device)
        for place, scores in drawn.items():
            counts[place] = len(scores)
        numbers = self._communicator.sum_(counts).tolist()
        pool = torch.zeros(sum(numbers), device=self._device)
        for place, part in enumerate(pool.split(numbers)):
            if place in drawn:
                part.copy_(drawn[place])
        by_gate = [0] * len(self._num_units)
        for gate, number in zip(self._fragment_gates, numbers, strict=True):
            by_gate[gate] += number
        parts = self._communicator.sum_(pool).split(by_gate)  # places ascend with their gates
        return {gate: self._around(gate, kept, parts[gate]) for gate, kept in keep.items()}

    def _around(self, gate: int, kept: int, sample: Tensor) -> tuple[int, int]:
        """The keys of the two scores of a gate's sample that the cut's rank lies between."""
        share, drawn = kept / self._num_units[gate], len(sample)
        reach = DEVIATIONS * (drawn * share * (1 - share)) ** 0.5 + 1
        above, below = int(share * drawn - reach), int(share * drawn + reach) + 1  # ranks from 1 on
        ranks = torch.tensor([min(below, drawn), max(above, 1)], device=self._device) - 1
        if not drawn:
            return LOWEST, HIGHEST
        low, high = to_keys(sample.sort(descending=True).values[ranks]).tolist()
        return low if below <= drawn else LOWEST, high if above >= 1 else HIGHEST

    def _draw(self, run: ScoreRuns, gates: Mapping[int, int]) -> Iterator[tuple[int, Tensor]]:
        """(place, drawn scores) of the fragments of these gates in one buffer."""
        for offset, length, gate, place in _fragments(run.table):
            if gate in gates:
                starts = torch.arange(0, length, self._strides[gate], device=self._device)
                random = torch.rand(len(starts), generator=self._generator, device=self._device, dtype=torch.float64)
                at = starts + (random * self._strides[gate]).long()
                yield place, run.scores[offset + at[at < length]]


def _fragments(table: Tensor) -> list[list[int]]:
    """(offset, length, gate, place) of every fragment: its rows, which follow each other, as one."""
    places, number = torch.unique_consecutive(table[:, PLACE], return_inverse=True)
    lengths = torch.zeros_like(places).index_add_(0, number, table[:, LENGTH])
    offsets = torch.full_like(places, 1 << 62).scatter_reduce_(0, number, table[:, OFFSET], "amin")
    gates = torch.zeros_like(places).scatter_(0, number, table[:, GATE])
    rows: list[list[int]] = torch.stack([offsets, lengths, gates, places], 1).tolist()
    return rows
