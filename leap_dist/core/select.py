"""Exact top-k over shards: the mask of every gate, without gathering scores.

For each gate the cut is the keep-th largest score of all ranks. Scores move little from step to step, so a bracket
around the expected cut decides nearly all of them in one pass: what lies above is kept, what lies below is not, and
the candidates between are collected. Where too many lie between (a level that jumps, many equal scores), nothing is
collected: the same passes go over the scores where they lie, which takes no memory. A gate whose cut has left its
bracket is aimed at anew with a sample of its scores, and if that misses too it is searched among all of them.
Ranks map the candidates' fp32 scores to integer keys of the same order, measured from the low end of their bracket and
aligned at the top, and narrow the cut digit by digit: local histograms for all gates at once, one all-reduce, choose
the digit; the first brings the counts above the brackets along. The first NUM_PASSES digits tell any two scores in a
bracket of +-1/16 of its cut apart, and are nearly always enough in wider ones: a cut need not be known any better once
all scores that share its digits are kept. Scores equal to the cut are kept by lowest index: every fragment reports how
many it holds, and takes its share after the fragments before it. The result depends only on the scores, bit for bit,
whatever the number of ranks and the split.

On a GPU the host waits twice for the candidates' number and once at the end.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from leap_dist.core.communicator import Communicator
from leap_dist.ops import dispatch
from leap_dist.ops.reference import DIGIT_BITS, GATE, KEY_BITS, LENGTH, PLACE, to_keys

MANY, STRIDE = 1 << 16, 64  # gates of so many units are first aimed at with every 64th score
AIM_SHIFT = 18  # such an aim is as coarse as a key without so many bits: 1/32 of a power of two
JUMP = 1 / 64  # of a gate's units: when its kept count moves by more, its last cut says nothing of the next one
FEW, SMALL = 32, 1 << 16  # collected are scores that are at most 1 in so many, or so few in all: each takes 55 bytes
MOST = 1 << 62
WIDEN = 6.0  # a bracket reaches this many times the last error of its prediction to either side
ANYWHERE = -math.inf, math.inf  # the edges of a bracket that is not known
SHIFTS = tuple(range(KEY_BITS - DIGIT_BITS, -1, -DIGIT_BITS))  # of the digits of a key
REST = 2  # the last digits, looked at only where a cut parts scores that share the ones before
NUM_PASSES = len(SHIFTS) - REST  # all-reduces of nearly every selection
COUNTS = 1 + (NUM_PASSES << DIGIT_BITS)  # that these sum for every gate: above its bracket, and by digit in each pass


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

    @property
    def edges(self) -> tuple[float, float]:
        """(low, high); all scores lie between infinite ones, and NaN counts as not known."""
        low, high = self.middle - self.width, self.middle + self.width
        return (low, high) if low <= high else ANYWHERE

    def follow(self, cut: float) -> None:
        """Expect the cut to move on as it has moved; the width follows the error of the last expectation."""
        error = abs(cut - self.middle)
        known = math.isfinite(error) and not math.isnan(self.cut)
        self.width = max(WIDEN * error, 0.8 * self.width, 1e-7) if known else abs(cut) / 16 + 1e-6
        self.middle = 2 * cut - self.cut if known else cut
        self.cut = cut


class Plan(NamedTuple):
    """What one search is asked, on the device, (G,) each but the edges of the brackets: (2, G), fp32.

    base: the key of the lower edge; room: how many low bits of an aligned key are 0; wanted: the kept counts.
    """

    edges: Tensor
    base: Tensor
    room: Tensor
    wanted: Tensor


class Collected(NamedTuple):
    """The scores inside the brackets on this rank, (n,) each: aligned key, gate, place; and how they were found.

    runs: what they are of; first: for every place the number of candidates before its own; positions: of every Runs,
    those of its candidates.
    """

    runs: Sequence[Runs]
    keys: Tensor
    gates: Tensor
    places: Tensor
    first: Tensor
    positions: list[Tensor]

    def histogram(self, prefix: Tensor, shift: int) -> Tensor:
        """How often each digit stands in the keys with their gate's prefix, int64 of shape (G, digits)."""
        return dispatch.histogram(self.keys, self.gates, prefix, shift)

    def count_ties(self, cuts: "Cuts", scores: Tensor) -> Tensor:
        """How many equal the cut of their gate, by place."""
        tie = self.keys == cuts.keys[self.gates]
        return torch.zeros_like(self.first).index_add_(0, self.places, tie.long())

    def write_(self, cuts: "Cuts", scores: Tensor, shares: Tensor | None) -> None:
        """The masks: from the cuts on, or of those that equal it the first `shares` of every place."""
        kept = self.keys >= cuts.keys[self.gates]
        if shares is not None:
            tie = self.keys == cuts.keys[self.gates]
            number = torch.cat([tie.new_zeros(1), tie]).cumsum(0)
            kept &= ~tie | (number[1:] - number[self.first[self.places]] <= shares[self.places])
        parts = kept.split([len(positions) for positions in self.positions])
        for run, positions, part in zip(self.runs, self.positions, parts, strict=True):
            run.mask[positions] = part


class InPlace(NamedTuple):
    """The same of scores that are too many to be collected: each pass goes over all of them where they lie.

    plan: of the search; num_places: on all ranks.
    """

    runs: Sequence[Runs]
    plan: Plan
    num_places: int

    def histogram(self, prefix: Tensor, shift: int) -> Tensor:
        """As Collected.histogram."""
        edges, base, room, _ = self.plan
        total = base.new_zeros(len(base), 1 << DIGIT_BITS)
        for run in self.runs:
            total += dispatch.score_histogram(run.table, run.scores, edges, base, room, prefix, shift)
        return total

    def count_ties(self, cuts: "Cuts", scores: Tensor) -> Tensor:
        """As Collected.count_ties."""
        ties = cuts.need.new_zeros(self.num_places)
        for run in self.runs:
            ties.index_add_(0, run.table[:, PLACE], self._ties(run, scores))
        return ties

    def write_(self, cuts: "Cuts", scores: Tensor, shares: Tensor | None) -> None:
        """As Collected.write_."""
        for run in self.runs:
            if shares is None:
                left = torch.full_like(run.table[:, PLACE], MOST)
            else:  # the rows of a place follow each other, and take their share in turn
                ties, places = self._ties(run, scores), run.table[:, PLACE]
                before = ties.cumsum(0) - ties
                first = torch.full_like(shares, MOST).scatter_reduce_(0, places, before, "amin")
                left = shares[places] - (before - first[places])
            dispatch.cut_(run.table, run.scores, scores, left, run.mask)

    def _ties(self, run: Runs, scores: Tensor) -> Tensor:
        return dispatch.count_inside(run.table, run.scores, torch.stack([scores, scores]))[:, 1]


class Cuts(NamedTuple):
    """How far the cuts are known, the same on every rank, on the device, (G,) each.

    keys: aligned, with 0 for the digits that are not known; need: how many are kept of those that share the known
    digits; equal: how many share them.
    """

    keys: Tensor
    need: Tensor
    equal: Tensor


class ReadBack(NamedTuple):
    """What the host has to know of every gate after a search.

    scores: the cuts; parted: of the scores that share a cut's known digits some are kept and some not; missed: the cut
    is not inside the bracket; num_inside: scores inside it, of all ranks.
    """

    scores: list[float]
    parted: list[float]
    missed: list[float]
    num_inside: list[float]


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
        self._num_units = list(num_units)
        self._counts = torch.int32 if max(num_units, default=0) < 2**31 else torch.int64  # half the bytes to send
        self._device = device or torch.device("cpu")
        self._fragment_gates = torch.tensor(fragment_gates, dtype=torch.int64, device=self._device)
        self._communicator = communicator
        self._brackets = [Bracket() for _ in num_units]
        self._keep = list(num_units)  # the kept counts of the last call

    def masks_(self, runs: Sequence[Runs], keep: Sequence[int]) -> None:
        """Write the mask of every run; `keep`: the kept count of every gate.

        Raises FloatingPointError if a gate's scores hold NaN.
        """
        for gate, (now, before, num) in enumerate(zip(keep, self._keep, self._num_units, strict=True)):
            if num >= MANY and abs(now - before) > JUMP * num:
                self._brackets[gate] = Bracket()
        self._keep = list(keep)
        for attempt in range(3):  # where the cuts are expected; by a sample; anywhere
            if attempt < 2:
                self._aim(runs, keep)
            edges = [bracket.edges for bracket in self._brackets]
            found, cuts, read = self._search(runs, edges, keep)
            counts = zip(edges, read.num_inside, self._num_units, strict=True)
            if lost := [gate for gate, (e, inside, num) in enumerate(counts) if e == ANYWHERE and inside < num]:
                raise FloatingPointError(f"the scores of gates {lost} hold NaN")
            if not any(read.missed):
                break
            self._brackets = [
                Bracket() if again else bracket for bracket, again in zip(self._brackets, read.missed, strict=True)
            ]
        for bracket, score in zip(self._brackets, read.scores, strict=True):
            bracket.follow(score)
        scores = torch.tensor(read.scores, dtype=torch.float32).to(self._device, non_blocking=True)
        shares = self._shares(found, cuts, scores) if any(read.parted) else None  # a cut goes through equal scores
        found.write_(cuts, scores, shares)

    def _aim(self, runs: Sequence[Runs], keep: Sequence[int]) -> None:
        """Brackets for large gates that have none yet, from a sample of their scores. One all-reduce if there are."""
        known = zip(self._brackets, self._num_units, strict=True)
        cold = [gate for gate, (bracket, num) in enumerate(known) if bracket.edges == ANYWHERE and num >= MANY]
        if not cold:
            return
        number, bins = {gate: i for i, gate in enumerate(cold)}, 1 << (32 - AIM_SHIFT)
        histogram = torch.zeros(len(cold), bins, dtype=torch.int64, device=self._device)
        for run in runs:
            for offset, length, gate, _ in run.table.tolist():
                if gate in number:
                    sampled = to_keys(run.scores[offset : offset + length : STRIDE]) >> AIM_SHIFT
                    histogram[number[gate]] += torch.bincount(sampled, minlength=bins)
        at_least = self._communicator.sum_(histogram).cpu().flip(1).cumsum(1).flip(1)
        for gate, counts in zip(cold, at_least, strict=True):
            rank = counts[0].item() * keep[gate] / self._num_units[gate]
            error = 3.0 * counts[0].item() ** 0.5  # of the rank: six standard deviations at most
            last = [int((counts >= max(edge, 1.0)).sum()) - 1 for edge in (rank + error, rank - error)]
            keys = torch.tensor([max(last[0], 0) << AIM_SHIFT, ((last[1] + 1) << AIM_SHIFT) - 1])
            low, high = _to_scores(keys).tolist()
            if math.isfinite(high - low):
                self._brackets[gate] = Bracket(0.5 * (low + high), 0.5 * (high - low), float("nan"))

    def _search(
        self, runs: Sequence[Runs], edges: Sequence[tuple[float, float]], keep: Sequence[int]
    ) -> tuple[Collected | InPlace, Cuts, ReadBack]:
        """Part the scores by the edges, and find the cuts between them."""
        plan, wide = _plan(edges, keep, self._device)
        counts = [dispatch.count_inside(run.table, run.scores, plan.edges) for run in runs]
        found = self._found(runs, counts, plan)
        start = torch.zeros_like(plan.wanted)
        above = torch.zeros_like(start)
        for run, count in zip(runs, counts, strict=True):
            above.index_add_(0, run.table[:, GATE], count[:, 0])
        summed = self._sum(torch.cat([found.histogram(start, SHIFTS[0]), above[:, None]], 1))
        histogram, need = summed[:, :-1], plan.wanted - summed[:, -1]
        inside = histogram.sum(1)
        missed = (need < 1) | (need > inside)
        cuts = self._narrow(found, _choose(histogram, Cuts(start, need, inside), SHIFTS[0]), SHIFTS[1:-REST])
        read = _read_back(plan, cuts, missed, inside)
        if not any(read.missed) and any(apart and more for apart, more in zip(read.parted, wide, strict=True)):
            cuts = self._narrow(found, cuts, SHIFTS[-REST:])
            read = _read_back(plan, cuts, missed, inside)
        return found, cuts, read

    def _found(self, runs: Sequence[Runs], counts: Sequence[Tensor], plan: Plan) -> Collected | InPlace:
        """The scores inside the brackets: collected where they are few, whatever other ranks do with theirs."""
        empty = torch.empty(0, dtype=torch.int64, device=self._device)
        table = torch.cat([empty.view(0, 4), *(run.table for run in runs)])
        inside = torch.cat([empty, *(count[:, 1] for count in counts)])
        num, total = torch.stack([inside.sum(), table[:, LENGTH].sum()]).tolist()
        if num * FEW > total + SMALL:
            return InPlace(runs, plan, len(self._fragment_gates))
        positions = [dispatch.collect_(run.table, run.scores, plan.edges, run.mask)[1] for run in runs]
        gates, places = torch.repeat_interleave(table[:, [GATE, PLACE]], inside, dim=0, output_size=num).unbind(1)
        keys = torch.cat([empty, *(to_keys(run.scores[at]) for run, at in zip(runs, positions, strict=True))])
        keys = (keys - plan.base[gates]) << plan.room[gates]
        first = torch.full_like(self._fragment_gates, num)
        first.scatter_reduce_(0, table[:, PLACE], inside.cumsum(0) - inside, "amin")
        return Collected(runs, keys, gates, places, first, positions)

    def _narrow(self, found: Collected | InPlace, cuts: Cuts, shifts: Iterable[int]) -> Cuts:
        """The cuts with the digits at these shifts. One all-reduce for each."""
        for shift in shifts:
            histogram = found.histogram(cuts.keys >> (shift + DIGIT_BITS), shift)
            cuts = _choose(self._sum(histogram), cuts, shift)
        return cuts

    def _sum(self, counts: Tensor) -> Tensor:
        """Counts of units, summed over the ranks."""
        return self._communicator.sum_(counts.to(self._counts)).long()

    def _shares(self, found: Collected | InPlace, cuts: Cuts, scores: Tensor) -> Tensor:
        """How many of the scores that equal the cut of their gate are kept, by place: the lowest go first."""
        ties = self._communicator.sum_(found.count_ties(cuts, scores))
        of_gate = torch.zeros_like(cuts.need).index_add_(0, self._fragment_gates, ties)
        earlier = (of_gate.cumsum(0) - of_gate)[self._fragment_gates]  # ties of all gates before a fragment's own
        return cuts.need[self._fragment_gates] - (ties.cumsum(0) - ties - earlier)


def _plan(edges: Sequence[tuple[float, float]], keep: Sequence[int], device: torch.device) -> tuple[Plan, list[bool]]:
    """A search on the device, in one transfer; and for which gates the first digits of a key are not all of it."""
    rounded = torch.tensor(edges, dtype=torch.float32).view(-1, 2).T
    low, high = to_keys(rounded)
    _, bits = torch.frexp((high - low).double())  # the bits of the largest key
    room = KEY_BITS - bits
    rows = torch.stack([*rounded.double(), low, room, torch.tensor(keep)]).to(device, non_blocking=True)
    return Plan(rows[:2].float(), *rows[2:].long()), (room < REST * DIGIT_BITS).tolist()


def _choose(histogram: Tensor, cuts: Cuts, shift: int) -> Cuts:
    """The cuts with the digit that holds the need-th largest key; histogram: (G, digits)."""
    at_least = histogram.flip(1).cumsum(1).flip(1)  # keys with this digit or a larger one
    digit = ((at_least >= cuts.need[:, None]).sum(1) - 1).clamp(min=0)  # none if the cut has left the bracket
    equal = histogram.gather(1, digit[:, None]).squeeze(1)
    need = cuts.need - (at_least.gather(1, digit[:, None]).squeeze(1) - equal)
    return Cuts(cuts.keys | (digit << shift), need, equal)


def _read_back(plan: Plan, cuts: Cuts, missed: Tensor, inside: Tensor) -> ReadBack:
    """One transfer from the device."""
    scores = _to_scores(plan.base + (cuts.keys >> plan.room)).double()
    rows: list[list[float]] = torch.stack([scores, cuts.need < cuts.equal, missed, inside]).tolist()
    return ReadBack(*rows)


def _to_scores(keys: Tensor) -> Tensor:
    """The inverse of `to_keys`."""
    bits = torch.where(keys >= 2**31, keys - 2**31, ~keys)
    return bits.to(torch.int32).view(torch.float32)
