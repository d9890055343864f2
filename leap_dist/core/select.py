"""Exact top-k over shards: the mask of every gate, without gathering scores.

For each gate the cut is the keep-th largest score of all ranks. It is bracketed first, then found inside the bracket:

1. Count the scores above the bracket and inside it, in one pass and one all-reduce. Scores move little from step to
   step, so the place where the last cuts point to nearly always holds the next one and few scores beside it. A gate
   that is new, or whose kept count has jumped, or whose cut lies elsewhere, is aimed at with a sample of its scores:
   between two values of it lie few others, whatever the scores. Where many remain they equal one of the two values,
   which a further count tells: that value is the cut, and nothing has to be searched.
2. Copy the few scores inside the brackets, and narrow the cuts among them, digit by digit (core/digits.py). The first
   NUM_PASSES digits tell any two scores in a bracket of +-1/16 of its cut apart, and are nearly always enough in wider
   ones: a cut need not be known any better once all scores that share its digits are kept.
3. Write the masks in one pass. Scores equal to the cut are kept by lowest index: every fragment reports how many it
   holds, and takes its share after the fragments before it.

The result depends only on the scores, bit for bit, whatever the number of ranks, the split and the sample. What is
copied is at most 1 in FEW of a gate's scores. On a GPU the host waits for the counts, for the number copied, and once
at the end.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from leap_dist.core.brackets import ANYWHERE, FEW, SMALL, Bracket, Hunt
from leap_dist.core.communicator import Communicator
from leap_dist.core.digits import (
    HIGHEST,
    LOWEST,
    NUM_PASSES,
    REST,
    SHIFTS,
    Cuts,
    Keys,
    RankSum,
    ScoreRuns,
    Taken,
    narrow,
    to_scores,
)
from leap_dist.core.sample import SAMPLE, Sampler
from leap_dist.ops import dispatch
from leap_dist.ops.reference import CPU_BLOCK, DIGIT_BITS, GATE, KEYS, PLACE, to_keys

JUMP = 1 / 64  # of a gate's units: when its kept count moves by more, its last cut says nothing of the next one
MOST = 1 << 62
KNOWN_BITS = NUM_PASSES * DIGIT_BITS  # of a key, after the passes that are always made
NUM_SUMS = 1 + NUM_PASSES  # all-reduces of nearly every selection
COUNTS = 2 + (NUM_PASSES << DIGIT_BITS)  # that these sum for every gate: above and inside its bracket, and by digit


def most_bytes(num_scores: int, num_gates: int) -> int:
    """What a selection takes beside scores and masks on one rank, at most, where gates have 4,096 units or more.

    1 in FEW scores copied, twice that while a sample is put together; a block of flags and of keys at a time; and of
    every gate the digits of its keys in five copies and a sample.
    """
    block = min(num_scores, CPU_BLOCK) * 14 + min(num_scores // FEW, KEYS) * 60
    return (
        num_scores * 4 // FEW + block + num_gates * (5 * 8 << DIGIT_BITS) + min(num_gates * SAMPLE, num_scores // 4) * 8
    )


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
        self._device = device or torch.device("cpu")
        self._fragment_gates = torch.tensor(fragment_gates, dtype=torch.int64, device=self._device)
        self._communicator = communicator
        self._rank_sum = RankSum(num_units, communicator)
        self._sampler = Sampler(num_units, fragment_gates, communicator, self._device)
        self._brackets = [Bracket() for _ in num_units]
        self._keep = list(num_units)  # the kept counts of the last call

    def masks_(self, runs: Sequence[ScoreRuns], keep: Sequence[int]) -> None:
        """Write the mask of every run; `keep`: the kept count of every gate.

        Raises FloatingPointError if NaN among a gate's scores leaves no cut.
        """
        self._forget_jumps(keep)
        hunts = [Hunt(kept, num) for kept, num in zip(keep, self._num_units, strict=True)]
        inside = self._bracket(runs, hunts)
        scores, parted = self._find(runs, hunts, inside)
        for bracket, hunt, score in zip(self._brackets, hunts, scores, strict=True):
            if hunt.tries > 1:  # the expectation was wrong: what it was off by says nothing
                bracket.cut = math.nan
            bracket.crowded = hunt.low == hunt.high and not hunt.few
            bracket.follow(score)
        self._write_(runs, scores, parted)

    def _forget_jumps(self, keep: Sequence[int]) -> None:
        """Drop the brackets of gates whose kept count moves far."""
        for gate, (now, before, num) in enumerate(zip(keep, self._keep, self._num_units, strict=True)):
            if num > SMALL and abs(now - before) > JUMP * num:
                self._brackets[gate] = Bracket()
        self._keep = list(keep)

    def _bracket(self, runs: Sequence[ScoreRuns], hunts: Sequence[Hunt]) -> list[Tensor]:
        """Narrow every hunt until it is done; of every row of the runs, how many scores were last counted inside."""
        inside = [torch.zeros(len(run.table), dtype=torch.int64, device=self._device) for run in runs]
        while pending := [gate for gate, hunt in enumerate(hunts) if not hunt.done]:
            edges = self._edges(runs, hunts, pending)
            bracket = self._scores_at([edges.get(gate, (LOWEST, HIGHEST)) for gate in range(len(hunts))])
            total = torch.zeros(len(hunts), 2, dtype=torch.int64, device=self._device)
            for run, own in zip(runs, inside, strict=True):
                rows = self._rows(run, pending)
                table = run.table[rows]
                counts = dispatch.count_inside(table, run.scores, bracket)
                own[rows] = counts[:, 1]
                total.index_add_(0, table[:, GATE], counts)
            counted = self._rank_sum.sum(total).tolist()
            for gate, (low, high) in edges.items():
                hunts[gate].learn(low, high, *counted[gate])
            if lost := [gate for gate, hunt in enumerate(hunts) if hunt.broken]:
                raise FloatingPointError(f"the scores of gates {lost} hold NaN")
        return inside

    def _edges(
        self, runs: Sequence[ScoreRuns], hunts: Sequence[Hunt], pending: Sequence[int]
    ) -> dict[int, tuple[int, int]]:
        """Keys between which the scores of every pending gate are counted next."""
        expected = torch.tensor([bracket.edges for bracket in self._brackets], dtype=torch.float32).view(-1, 2)
        keys = to_keys(expected).tolist()
        found, aimed = {}, []
        for gate in pending:
            hunt = hunts[gate]
            if hunt.tries == 0 and self._brackets[gate].edges != ANYWHERE:
                found[gate] = tuple(keys[gate])
            elif hunt.wants_sample:
                aimed.append(gate)
            else:
                found[gate] = hunt.next_edges()
        keep = {gate: hunts[gate].keep for gate in aimed}
        for gate, (low, high) in self._sampler.aim(runs, keep).items():
            hunt = hunts[gate]
            low, high = max(low, hunt.low), min(high, hunt.high)
            found[gate] = (low, high) if low <= high else (hunt.low, hunt.high)
            hunt.sampled = True
        return found

    def _find(
        self, runs: Sequence[ScoreRuns], hunts: Sequence[Hunt], inside: Sequence[Tensor]
    ) -> tuple[list[float], dict[int, int]]:
        """The cut of every gate; and of the gates whose cut parts equal scores, how many of these are kept."""
        edges = [(hunt.low, hunt.high) for hunt in hunts]
        scores = self._scores_at(edges)[0].tolist()
        need, equal = [hunt.need for hunt in hunts], [hunt.inside for hunt in hunts]
        searched = [gate for gate, (low, high) in enumerate(edges) if low < high]
        if searched:
            keys, taken = Keys.between(edges, self._device), self._take(runs, edges, searched, inside)
            counts = torch.tensor([need, equal]).to(self._device, non_blocking=True)
            cuts = narrow(taken, keys, Cuts(torch.zeros_like(keys.base), *counts), SHIFTS[:-REST], self._rank_sum)
            read = _read_back(keys, cuts)
            wide = [(high - low).bit_length() > KNOWN_BITS for low, high in edges]
            if any(wide[gate] and read[1][gate] < read[2][gate] for gate in searched):
                cuts = narrow(taken, keys, cuts, SHIFTS[-REST:], self._rank_sum)
                read = _read_back(keys, cuts)
            for gate in searched:
                scores[gate], need[gate], equal[gate] = read[0][gate], int(read[1][gate]), int(read[2][gate])
        return scores, {gate: own for gate, own in enumerate(need) if own < equal[gate]}

    def _take(
        self,
        runs: Sequence[ScoreRuns],
        edges: Sequence[tuple[int, int]],
        searched: Sequence[int],
        inside: Sequence[Tensor],
    ) -> list[Taken]:
        """Copies of the scores between the edges, of the gates that are searched."""
        bracket, found = self._scores_at(edges), []
        for run, counted in zip(runs, inside, strict=True):
            rows = self._rows(run, searched)
            table, counts = run.table[rows], counted[rows]
            scores = dispatch.take_inside(table, run.scores, bracket, counts)
            own = torch.stack([counts.cumsum(0) - counts, counts, table[:, GATE], table[:, PLACE]], 1)
            found.append(Taken(own, scores))
        return found

    def _write_(self, runs: Sequence[ScoreRuns], scores: Sequence[float], parted: dict[int, int]) -> None:
        """The masks: from the cuts on, and of parted gates as many of those that equal it, the lowest first."""
        cuts = torch.tensor(scores, dtype=torch.float32).to(self._device, non_blocking=True)
        left = [torch.full_like(run.table[:, PLACE], MOST) for run in runs]
        if parted:
            rows = [self._rows(run, list(parted)) for run in runs]
            tables = [run.table[own] for run, own in zip(runs, rows, strict=True)]
            ties = [
                dispatch.count_inside(table, run.scores, torch.stack([cuts, cuts]))[:, 1]
                for run, table in zip(runs, tables, strict=True)
            ]
            shares = self._shares(tables, ties, parted)
            for own, row, table, tie in zip(left, rows, tables, ties, strict=True):
                places = table[:, PLACE]  # the rows of a place follow each other, and take their share in turn
                before = tie.cumsum(0) - tie
                first = torch.full_like(shares, MOST).scatter_reduce_(0, places, before, "amin")
                own[row] = shares[places] - (before - first[places])
        for run, own in zip(runs, left, strict=True):
            dispatch.cut_(run.table, run.scores, cuts, own, run.mask)

    def _shares(self, tables: Sequence[Tensor], ties: Sequence[Tensor], parted: dict[int, int]) -> Tensor:
        """How many of the scores that equal the cut of their gate are kept, by place: the lowest go first."""
        total = torch.zeros_like(self._fragment_gates)
        for table, tie in zip(tables, ties, strict=True):
            total.index_add_(0, table[:, PLACE], tie)
        total = self._communicator.sum_(total)
        need = torch.tensor([parted.get(gate, 0) for gate in range(len(self._num_units))]).to(self._device)
        of_gate = torch.zeros_like(need).index_add_(0, self._fragment_gates, total)
        earlier = (of_gate.cumsum(0) - of_gate)[self._fragment_gates]  # ties of all gates before a fragment's own
        return need[self._fragment_gates] - (total.cumsum(0) - total - earlier)

    def _scores_at(self, edges: Sequence[tuple[int, int]]) -> Tensor:
        """The scores of the keys, fp32 of shape (2, G), on the device."""
        return to_scores(torch.tensor(edges).view(-1, 2).T).contiguous().to(self._device, non_blocking=True)

    def _rows(self, run: ScoreRuns, gates: Sequence[int]) -> slice | Tensor:
        """The rows of these gates."""
        if len(gates) == len(self._num_units):
            return slice(None)
        flags = torch.zeros(len(self._num_units), dtype=torch.bool)
        flags[list(gates)] = True
        return flags.to(self._device)[run.table[:, GATE]]


def _read_back(keys: Keys, cuts: Cuts) -> list[list[float]]:
    """(score, need, equal) of every gate: one transfer from the device."""
    rows: list[list[float]] = torch.stack([keys.scores(cuts.keys).double(), cuts.need, cuts.equal]).tolist()
    return rows
