"""Where the cut of a gate may lie, by a sample of its scores from all ranks: two of them between which few others lie."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from leap_dist.core.digits import HIGHEST, LOWEST, SHIFTS, Counter, Cuts, Keys, Runs, Taken, choose, count_digits
from leap_dist.ops.reference import DIGIT_BITS, GATE, LENGTH, OFFSET, PLACE

SAMPLE, SHARE = 1 << 12, 8  # a gate is sampled with about so many scores, and 1 in so many where it has few
DEVIATIONS = 3.5  # of the cut's rank in the sample; the bracket reaches as far to either side


class Sampler:
    """Draws from every gate one score at random out of each `stride` neighbours: no order of scores is in step with it.

    Draws differ from call to call and from rank to rank; no mask depends on them.
    """

    def __init__(self, num_units: Sequence[int], counter: Counter, device: torch.device) -> None:
        self._num_units = list(num_units)
        self._strides = [max(num // min(SAMPLE, max(num // SHARE, 1)), 1) for num in num_units]
        self._counter, self._device = counter, device
        self._generator = torch.Generator(device).manual_seed(0)

    def aim(self, runs: Sequence[Runs], keep: Mapping[int, int]) -> dict[int, tuple[int, int]]:
        """The lowest and highest key that are expected of the cuts of these gates. One all-reduce for a digit."""
        if not keep:
            return {}
        taken = [self._draw(run, set(keep)) for run in runs]
        keys = Keys.between([(0, 2**32 - 1)] * len(self._num_units), self._device)
        start = torch.zeros_like(keys.base)
        first = self._counter.sum(count_digits(taken, keys, start, SHIFTS[0]))
        ranks = self._ranks(first.sum(1).tolist(), keep)  # of the upper and of the lower edge
        pair = [choose(first, Cuts(start, rank.clamp(min=1), start), SHIFTS[0]) for rank in ranks.unbind(1)]
        for shift in SHIFTS[1:]:
            counts = [count_digits(taken, keys, cuts.keys >> (shift + DIGIT_BITS), shift) for cuts in pair]
            summed = self._counter.sum(torch.cat(counts)).chunk(2)
            pair = [choose(histogram, cuts, shift) for histogram, cuts in zip(summed, pair, strict=True)]
        high, low = torch.stack([cuts.keys >> keys.room for cuts in pair]).tolist()
        beyond = torch.stack([ranks[:, 0] < 1, ranks[:, 1] > first.sum(1)], 1).tolist()
        return {g: (LOWEST if beyond[g][1] else low[g], HIGHEST if beyond[g][0] else high[g]) for g in keep}

    def _ranks(self, drawn: Sequence[int], keep: Mapping[int, int]) -> Tensor:
        """The ranks in the sample that the ranks of the cuts lie between, by gate: int64 of shape (G, 2)."""
        ranks = torch.zeros(len(drawn), 2, dtype=torch.int64)
        for gate, kept in keep.items():
            share = kept / self._num_units[gate]
            reach = DEVIATIONS * (drawn[gate] * share * (1 - share)) ** 0.5 + 1
            middle = share * drawn[gate]
            ranks[gate] = torch.tensor([int(middle - reach), int(middle + reach) + 1])
        return ranks.to(self._device)

    def _draw(self, run: Runs, gates: set[int]) -> Taken:
        """The drawn scores of one buffer, by fragment."""
        rows: list[tuple[int, int, int, int]] = []
        drawn = [run.scores.new_empty(0)]
        first = 0
        for offset, length, gate, place in _fragments(run.table):
            if gate not in gates:
                continue
            stride = self._strides[gate]
            starts = torch.arange(0, length, stride, device=self._device)
            random = torch.rand(len(starts), generator=self._generator, device=self._device, dtype=torch.float64)
            at = starts + (random * stride).long()
            scores = run.scores[offset + at[at < length]]
            rows.append((first, len(scores), gate, place))
            drawn.append(scores)
            first += len(scores)
        return Taken(torch.tensor(rows, dtype=torch.int64).view(-1, 4).to(self._device), torch.cat(drawn))


def _fragments(table: Tensor) -> list[tuple[int, int, int, int]]:
    """(offset, length, gate, place) of every fragment: its rows, which follow each other, as one."""
    if not len(table):
        return []
    places, number = torch.unique_consecutive(table[:, PLACE], return_inverse=True)
    lengths = torch.zeros_like(places).index_add_(0, number, table[:, LENGTH])
    offsets = torch.full_like(places, 1 << 62).scatter_reduce_(0, number, table[:, OFFSET], "amin")
    gates = torch.zeros_like(places).scatter_(0, number, table[:, GATE])
    return [(o, n, g, p) for o, n, g, p in torch.stack([offsets, lengths, gates, places], 1).tolist()]
