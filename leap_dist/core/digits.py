"""Radix select: the need-th largest of the scores of every gate, digit by digit, over all ranks.

Scores become integer keys of the same order, measured from the low end of their gate's bracket and aligned at the top.
A pass counts the digits of all gates at once on every rank, sums the counts, and chooses a digit.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from leap_dist.core.communicator import Communicator
from leap_dist.ops import dispatch
from leap_dist.ops.reference import DIGIT_BITS, KEY_BITS, to_keys

SHIFTS = tuple(range(KEY_BITS - DIGIT_BITS, -1, -DIGIT_BITS))  # of the digits of a key
REST = 2  # the last digits, looked at only where a cut parts scores that share the ones before
NUM_PASSES = len(SHIFTS) - REST  # that nearly every selection takes
LOWEST, HIGHEST = to_keys(torch.tensor([-math.inf, math.inf])).tolist()


@dataclass(frozen=True)
class ScoreRuns:
    """Runs of scores in one flat buffer, fp32, and the bool buffer of its shape that their mask goes to.

    table: rows (offset, length, gate, place), see ops/reference.py. `place` numbers the fragments of all gates on all
    ranks, ascending in (gate, start); the rows of one fragment follow each other.
    """

    scores: Tensor
    mask: Tensor
    table: Tensor


class Taken(NamedTuple):
    """Copies of some scores, fp32 of shape (n,), and the table of the rows that cover them in their order."""

    table: Tensor
    scores: Tensor


class Keys(NamedTuple):
    """How scores become keys, (G,) each: (key - base) << room; room: how many low bits of every key are 0."""

    base: Tensor
    room: Tensor

    @classmethod
    def between(cls, edges: Sequence[tuple[int, int]], device: torch.device) -> "Keys":
        """For scores whose keys lie between these edges."""
        rooms = [KEY_BITS - (high - low).bit_length() for low, high in edges]
        return cls(*torch.tensor([[low for low, _ in edges], rooms]).to(device, non_blocking=True))

    def scores(self, aligned: Tensor) -> Tensor:
        """The scores of aligned keys, fp32."""
        return to_scores(self.base + (aligned >> self.room))


class Cuts(NamedTuple):
    """How far the cuts are known, the same on every rank, on the device, (G,) each.

    keys: aligned, with 0 for the digits that are not known; need: how many are kept of those that share the known
    digits; equal: how many share them.
    """

    keys: Tensor
    need: Tensor
    equal: Tensor


class RankSum:
    """Sums counts of units over the ranks, in half the bytes where they allow it."""

    def __init__(self, num_units: Sequence[int], communicator: Communicator) -> None:
        self._dtype = torch.int32 if max(num_units, default=0) < 2**31 else torch.int64
        self._communicator = communicator

    def sum(self, counts: Tensor) -> Tensor:
        """int64, the same on every rank."""
        return self._communicator.sum_(counts.to(self._dtype)).long()


def count_digits(taken: Sequence[Taken], keys: Keys, prefix: Tensor, shift: int) -> Tensor:
    """How often each digit stands in the keys with their gate's prefix, on this rank: int64 of shape (G, digits)."""
    total = keys.base.new_zeros(len(keys.base), 1 << DIGIT_BITS)
    for part in taken:
        total += dispatch.histogram(part.table, part.scores, *keys, prefix, shift)
    return total


def narrow(taken: Sequence[Taken], keys: Keys, cuts: Cuts, shifts: Iterable[int], rank_sum: RankSum) -> Cuts:
    """The cuts with the digits at these shifts. One all-reduce for each."""
    for shift in shifts:
        histogram = count_digits(taken, keys, cuts.keys >> (shift + DIGIT_BITS), shift)
        cuts = choose_digit(rank_sum.sum(histogram), cuts, shift)
    return cuts


def choose_digit(histogram: Tensor, cuts: Cuts, shift: int) -> Cuts:
    """The cuts with the digit that holds the need-th largest key; histogram: (G, digits)."""
    at_least = histogram.flip(1).cumsum(1).flip(1)  # keys with this digit or a larger one
    digit = ((at_least >= cuts.need[:, None]).sum(1) - 1).clamp(min=0)
    equal = histogram.gather(1, digit[:, None]).squeeze(1)
    need = cuts.need - (at_least.gather(1, digit[:, None]).squeeze(1) - equal)
    return Cuts(cuts.keys | (digit << shift), need, equal)


def to_scores(keys: Tensor) -> Tensor:
    """The inverse of `to_keys`."""
    bits = torch.where(keys >= 2**31, keys - 2**31, -keys)
    return bits.to(torch.int32).view(torch.float32)
