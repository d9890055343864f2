"""Exact top-k over shards: the mask of every gate, without gathering scores.

For each gate the cut is the keep-th largest score of all ranks. Scores move little from step to step, so a bracket
around the expected cut decides nearly all of them in one pass: what lies above is kept, what lies below is not, and
the candidates between are collected. A gate whose cut has left its bracket is searched again among all its scores.
Ranks map the candidates' fp32 scores to uint32 keys of the same order and narrow the cut digit by digit: local
histograms for all gates at once, one all-reduce, choose the digit. Scores equal to the cut are kept by lowest index:
every fragment reports how many it holds, and takes its share after the fragments before it. The result depends only
on the scores, bit for bit, whatever the number of ranks and the split.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from leap_dist.core.communicator import Communicator
from leap_dist.ops import dispatch
from leap_dist.ops.reference import DIGIT_BITS, GATE, PLACE

MANY, STRIDE = 1 << 16, 64  # gates of so many units are first aimed at with every 64th score
AIM_SHIFT = 18  # such an aim is as coarse as a key without so many bits: 1/32 of a power of two
WIDEN = 6.0  # a bracket reaches this many times the last error of its prediction to either side


@dataclass(frozen=True)
class Runs:
    """Runs of scores in one flat buffer, fp32, and the bool buffer of its shape that their mask goes to.

    table: rows (offset, length, gate, place), see ops/reference.py. `place` numbers the fragments of all gates on all
    ranks, ascending in (gate, start); the rows of one fragment follow each other.
    """

    scores: Tensor
    mask: Tensor
    table: Tensor


@dataclass
class Bracket:
    """Where the next cut is expected: middle +- width; infinite width means anywhere. cut: the last one, or NaN."""

    middle: float = 0.0
    width: float = float("inf")
    cut: float = float("nan")

    def follow(self, cut: float) -> None:
        """Expect the cut to move on as it has moved; the width follows the error of the last expectation."""
        error = abs(cut - self.middle)
        known = not math.isnan(self.cut)
        self.width = max(WIDEN * error, 0.8 * self.width, 1e-7) if known else abs(cut) / 16 + 1e-6
        self.middle = 2 * cut - self.cut if known else cut
        self.cut = cut


class Candidates(NamedTuple):
    """The scores inside the brackets on this rank, (n,) each: key, gate, place; and how they were found.

    first: for every place the number of candidates before its own; num_above, num_inside: (G,), of all ranks, on the
    CPU; positions: of every Runs, those of its candidates.
    """

    keys: Tensor
    gates: Tensor
    places: Tensor
    first: Tensor
    num_above: Tensor
    num_inside: Tensor
    positions: list[Tensor]


class Selector:
    """Selects for a fixed set of gates and fragments; brackets are kept from call to call.

    num_units: n of every gate; fragment_gates: the gate of every fragment of all ranks, in the order of their places.
    """

    def __init__(
        self,
        num_units: Sequence[int],
        fragment_gates: Sequence[int],
        communicator: Communicator,
        device: torch.device | None = None,
    ) -> None:
        self._num_units = torch.tensor(num_units, dtype=torch.int64)
        self._counts = torch.int32 if max(num_units, default=0) < 2**31 else torch.int64  # half the bytes to send
        self._device = device or torch.device("cpu")
        self._fragment_gates = torch.tensor(fragment_gates, dtype=torch.int64, device=self._device)
        self._communicator = communicator
        self._brackets = [Bracket() for _ in num_units]

    def masks_(self, runs: Sequence[Runs], keep: Sequence[int]) -> None:
        """Write the mask of every run; `keep`: the kept count of every gate.

        Raises FloatingPointError if a gate's scores hold NaN.
        """
        wanted = torch.tensor(keep, dtype=torch.int64)
        self._aim(runs, wanted)
        found = self._candidates(runs, self._brackets)
        missed = _missed(found, wanted)
        if missed.any():
            pairs = zip(self._brackets, missed.tolist(), strict=True)
            found = self._candidates(runs, [Bracket() if again else bracket for bracket, again in pairs])
            if (lost := missed & (found.num_inside < self._num_units)).any():
                raise FloatingPointError(f"the scores of gates {lost.nonzero().flatten().tolist()} hold NaN")
        need = (wanted - found.num_above).to(self._device)
        cuts, need, equal = self._radix_select(found.keys, found.gates, need)
        scores, ties = _to_scores(cuts).double(), (need < equal).double()
        new_cuts, tied = torch.stack([scores, ties]).tolist()
        for bracket, cut in zip(self._brackets, new_cuts, strict=True):
            bracket.follow(cut)
        kept = found.keys >= cuts[found.gates]
        if any(tied):  # a cut goes through equal scores
            kept &= self._lowest(found, cuts, need, need < equal)
        parts = kept.split([len(positions) for positions in found.positions])
        for run, positions, part in zip(runs, found.positions, parts, strict=True):
            run.mask[positions] = part

    def _aim(self, runs: Sequence[Runs], wanted: Tensor) -> None:
        """Brackets for large gates that have none yet, from a sample of their scores. One all-reduce if there are."""
        unknown = torch.tensor([bracket.width == float("inf") for bracket in self._brackets], dtype=torch.bool)
        cold = (unknown & (self._num_units >= MANY)).nonzero().squeeze(1).tolist()
        if not cold:
            return
        number, bins = {gate: i for i, gate in enumerate(cold)}, 1 << (32 - AIM_SHIFT)
        histogram = torch.zeros(len(cold), bins, dtype=torch.int64, device=self._device)
        for run in runs:
            for offset, length, gate, _ in run.table.tolist():
                if gate in number:
                    sampled = _to_keys(run.scores[offset : offset + length : STRIDE]) >> AIM_SHIFT
                    histogram[number[gate]] += torch.bincount(sampled, minlength=bins)
        at_least = self._communicator.sum_(histogram).cpu().flip(1).cumsum(1).flip(1)
        for gate, counts in zip(cold, at_least, strict=True):
            rank = counts[0].item() * wanted[gate].item() / self._num_units[gate].item()
            error = 3.0 * counts[0].item() ** 0.5  # of the rank: six standard deviations at most
            last = [int((counts >= max(edge, 1.0)).sum()) - 1 for edge in (rank + error, rank - error)]
            keys = torch.tensor([max(last[0], 0) << AIM_SHIFT, ((last[1] + 1) << AIM_SHIFT) - 1])
            low, high = _to_scores(keys).tolist()
            if math.isfinite(high - low):
                self._brackets[gate] = Bracket(0.5 * (low + high), 0.5 * (high - low), float("nan"))

    def _candidates(self, runs: Sequence[Runs], brackets: Sequence[Bracket]) -> Candidates:
        """Collect the scores inside the brackets; masks become "not below the bracket"."""
        edges = [[b.middle - b.width for b in brackets], [b.middle + b.width for b in brackets]]
        bracket = torch.tensor(edges, dtype=torch.float32, device=self._device)
        results = [dispatch.collect_(run.table, run.scores, bracket, run.mask) for run in runs]
        empty = torch.empty(0, dtype=torch.int64, device=self._device)
        table = torch.cat([empty.view(0, 4), *(run.table for run in runs)])
        counts = torch.cat([empty.view(0, 2), *(count for count, _ in results)])
        totals = torch.zeros(len(brackets), 2, dtype=torch.int64, device=self._device)
        totals.index_add_(0, table[:, GATE], counts)
        above, inside = self._communicator.sum_(totals).cpu().unbind(1)
        keys = [_to_keys(run.scores[positions]) for run, (_, positions) in zip(runs, results, strict=True)]
        num = sum(len(k) for k in keys)
        rows = torch.repeat_interleave(table[:, [GATE, PLACE]], counts[:, 1], dim=0, output_size=num)
        first = torch.full_like(self._fragment_gates, num)
        first.scatter_reduce_(0, table[:, PLACE], counts[:, 1].cumsum(0) - counts[:, 1], "amin")
        positions = [positions for _, positions in results]
        return Candidates(torch.cat([empty, *keys]), rows[:, 0], rows[:, 1], first, above, inside, positions)

    def _radix_select(self, keys: Tensor, gates: Tensor, need: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per gate the need-th largest key, how many of its equals are needed, how many there are."""
        prefix = torch.zeros_like(need)
        for shift in range(32 - DIGIT_BITS, -1, -DIGIT_BITS):
            histogram = self._communicator.sum_(dispatch.histogram(keys, gates, prefix, shift).to(self._counts)).long()
            at_least = histogram.flip(1).cumsum(1).flip(1)  # keys with this digit or a larger one
            digit = (at_least >= need[:, None]).sum(1) - 1
            equal = histogram.gather(1, digit[:, None]).squeeze(1)
            need = need - (at_least.gather(1, digit[:, None]).squeeze(1) - equal)
            prefix = (prefix << DIGIT_BITS) | digit
        return prefix, need, equal

    def _lowest(self, found: Candidates, cuts: Tensor, need: Tensor, split: Tensor) -> Tensor:
        """False for the candidates that equal the cut of a gate in `split` and are not among the `need` lowest."""
        tie = (found.keys == cuts[found.gates]) & split[found.gates]
        ties = torch.zeros_like(self._fragment_gates).index_add_(0, found.places, tie.long())
        self._communicator.sum_(ties)
        of_gate = torch.zeros_like(need).index_add_(0, self._fragment_gates, ties)
        earlier = (of_gate.cumsum(0) - of_gate)[self._fragment_gates]  # ties of all gates before a fragment's own
        share = need[self._fragment_gates] - (ties.cumsum(0) - ties - earlier)
        number = torch.cat([tie.new_zeros(1), tie]).cumsum(0)
        return ~tie | (number[1:] - number[found.first[found.places]] <= share[found.places])


def _missed(found: Candidates, keep: Tensor) -> Tensor:
    """True for the gates whose cut is not inside the bracket."""
    return (keep <= found.num_above) | (keep > found.num_above + found.num_inside)


def _to_keys(scores: Tensor) -> Tensor:
    """fp32 -> int64 in [0, 2^32), in the same order; -0.0 and 0.0 share a key."""
    bits = (scores + 0.0).view(torch.int32).long()
    return torch.where(bits >= 0, bits + 2**31, ~bits)


def _to_scores(keys: Tensor) -> Tensor:
    """The inverse of `_to_keys`."""
    bits = torch.where(keys >= 2**31, keys - 2**31, ~keys)
    return bits.to(torch.int32).view(torch.float32)
