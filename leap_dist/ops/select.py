"""Exact top-k over shards: the mask of every gate, without gathering scores.

For each gate the cut is the keep-th largest score of all ranks. Ranks map fp32 scores to uint32 keys of the same
order and narrow the cut digit by digit: local histograms for all gates at once, one all-reduce, choose the digit.
Scores move little from step to step, so a bracket around the last cut leaves few candidates; a gate whose cut has
left its bracket is searched again among all its scores. Scores equal to the cut are kept by lowest index: every
fragment reports how many it holds, and takes its share after the fragments before it. The result depends only on
the scores, bit for bit, whatever the number of ranks and the split.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from leap_dist.core.communicator import Communicator
from leap_dist.ops.reference import blocks

DIGIT_BITS = 8
WIDEN = 6.0  # a bracket reaches this many times the last error of its prediction to either side


@dataclass(frozen=True)
class Run:
    """A run of scores on this rank: the gate it belongs to, its fp32 scores (n,), its place among all fragments.

    `order` numbers the fragments of all gates on all ranks, ascending in (gate, start).
    """

    gate: int
    scores: Tensor
    order: int


@dataclass
class Bracket:
    """Where the next cut is expected: middle +- width; infinite width means anywhere."""

    middle: float = 0.0
    width: float = float("inf")
    cut: float = 0.0

    def follow(self, cut: float) -> None:
        """Expect the cut to move on as it has moved; the width follows the error of the last expectation."""
        error = abs(cut - self.middle)
        known = self.width != float("inf")
        self.width = max(WIDEN * error, 0.8 * self.width, 1e-7) if known else abs(cut) / 16 + 1e-6
        self.middle = 2 * cut - self.cut if known else cut
        self.cut = cut


class Selector:
    """Selects for a fixed set of gates and fragments; brackets are kept from call to call.

    num_units: n of every gate; fragment_gates: the gate of every fragment of all ranks, in `Run.order`.
    """

    def __init__(self, num_units: Sequence[int], fragment_gates: Sequence[int], communicator: Communicator) -> None:
        self._num_units = list(num_units)
        self._fragment_gates = torch.tensor(fragment_gates, dtype=torch.int64)
        self._communicator = communicator
        self._brackets = [Bracket() for _ in num_units]

    def masks(self, runs: Sequence[Run], keep: Sequence[int]) -> list[Tensor]:
        """The bool mask of every run, shape of its scores; `keep`: the kept count of every gate.

        Raises FloatingPointError if a gate's scores hold NaN.
        """
        cuts, wanted, equal = self._cuts(runs, keep)
        for bracket, cut in zip(self._brackets, cuts.tolist(), strict=True):
            bracket.follow(cut)
        if torch.equal(wanted, equal):  # no cut goes through equal scores
            return [run.scores >= cuts[run.gate] for run in runs]
        return self._split_ties(runs, cuts, wanted, wanted < equal)

    def _cuts(self, runs: Sequence[Run], keep: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """For every gate the cut (fp32), how many scores equal to it are kept, and how many there are."""
        keys, gates, above, inside = self._candidates(runs, self._brackets)
        need = torch.tensor(keep) - above
        missed = (need < 1) | (need > inside)
        if missed.any():
            again = [run for run in runs if missed[run.gate]]
            all_keys, all_gates, _, inside = self._candidates(again, [Bracket()] * len(keep))
            if (missed & (inside < torch.tensor(self._num_units))).any():
                lost = (missed & (inside < torch.tensor(self._num_units))).nonzero().flatten().tolist()
                raise FloatingPointError(f"the scores of gates {lost} hold NaN")
            held = ~missed[gates]
            keys, gates = torch.cat([keys[held], all_keys]), torch.cat([gates[held], all_gates])
            need = torch.where(missed, torch.tensor(keep), need)
        return self._radix_select(keys, gates, need)

    def _candidates(self, runs: Sequence[Run], brackets: Sequence[Bracket]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(keys, gate of each key) of the scores inside the brackets here, (number above, inside) on all ranks.

        Subtraction rounds monotonically, so "above" and "inside" part the scores in order.
        """
        counts = torch.zeros(2, len(brackets), dtype=torch.int64)
        keys, gates = [], []
        for run in runs:
            bracket = brackets[run.gate]
            found, num_above = _inside(run.scores, bracket)
            counts[0, run.gate] += num_above
            counts[1, run.gate] += found.numel()
            keys.append(_to_keys(found).cpu())
            gates.append(torch.full((found.numel(),), run.gate))
        above, inside = self._communicator.sum_(counts)
        empty = [torch.empty(0, dtype=torch.int64)]
        return torch.cat(empty + keys), torch.cat(empty + gates), above, inside

    def _radix_select(self, keys: Tensor, gates: Tensor, need: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per gate the need-th largest key as a score, how many of its equals are needed, how many there are."""
        num_gates, bins = len(self._num_units), 1 << DIGIT_BITS
        prefix = torch.zeros(num_gates, dtype=torch.int64)
        for shift in range(32 - DIGIT_BITS, -1, -DIGIT_BITS):
            digits = (keys >> shift) & (bins - 1)
            histogram = torch.bincount(gates * bins + digits, minlength=num_gates * bins).view(num_gates, bins)
            self._communicator.sum_(histogram)
            at_least = histogram.flip(1).cumsum(1).flip(1)  # keys with this digit or a larger one
            digit = (at_least >= need[:, None]).sum(1) - 1
            equal = histogram.gather(1, digit[:, None]).squeeze(1)
            need = need - (at_least.gather(1, digit[:, None]).squeeze(1) - equal)
            prefix = (prefix << DIGIT_BITS) | digit
            same = digits == digit[gates]
            keys, gates = keys[same], gates[same]
        return _to_scores(prefix), need, equal

    def _split_ties(self, runs: Sequence[Run], cuts: Tensor, wanted: Tensor, split: Tensor) -> list[Tensor]:
        """Masks where at least one gate keeps only some of the scores equal to its cut: the lowest indices."""
        ties = torch.zeros(len(self._fragment_gates), dtype=torch.int64)
        for run in runs:
            if split[run.gate]:
                ties[run.order] = (run.scores == cuts[run.gate]).sum()
        self._communicator.sum_(ties)
        of_gate = torch.zeros(len(self._num_units), dtype=torch.int64).index_add_(0, self._fragment_gates, ties)
        first = (of_gate.cumsum(0) - of_gate)[self._fragment_gates]  # ties of all gates before a fragment's own
        before = ties.cumsum(0) - ties - first
        masks = []
        for run in runs:
            cut = cuts[run.gate]
            if not split[run.gate]:
                masks.append(run.scores >= cut)
                continue
            share = int(wanted[run.gate] - before[run.order])
            equal = run.scores == cut
            masks.append((run.scores > cut) | (equal & (equal.cumsum(0) <= share)))
        return masks


def _inside(scores: Tensor, bracket: Bracket) -> tuple[Tensor, int]:
    """The scores within a bracket, and how many lie above it."""
    if bracket.width == float("inf"):
        return scores[~scores.isnan()], 0
    found, num_above = [scores[:0]], 0
    for b in blocks(scores.numel(), scores.device):
        offset = scores[b] - bracket.middle
        num_above += int(torch.count_nonzero(offset > bracket.width))
        found.append(scores[b][offset.abs_() <= bracket.width])
    return torch.cat(found), num_above


def _to_keys(scores: Tensor) -> Tensor:
    """fp32 -> int64 in [0, 2^32), in the same order; -0.0 and 0.0 share a key."""
    bits = (scores + 0.0).view(torch.int32).long()
    return torch.where(bits >= 0, bits + 2**31, ~bits)


def _to_scores(keys: Tensor) -> Tensor:
    """The inverse of `_to_keys`."""
    bits = torch.where(keys >= 2**31, keys - 2**31, ~keys)
    return bits.to(torch.int32).view(torch.float32)
