"""Masks: from kept counts to the mask of every unit, and to that of every weight."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from leap_dist.core.digits import ScoreRuns
from leap_dist.core.flips import Flips
from leap_dist.core.gating import MASK, SCORE, Gating
from leap_dist.core.pattern import PatternRun, PatternSelector
from leap_dist.core.select import Selector
from leap_dist.ops import dispatch as ops
from leap_dist.ops.reference import run_table


class Masks:
    """The masks of the gates over the fragments of one rank; made by selecting over all ranks."""

    def __init__(self, gating: Gating) -> None:
        self._gating, self._communicator = gating, gating.communicator
        gates = gating.plan.gates
        self._score_keys = (SCORE,) if SCORE in gating.keys else ()
        self._hybrid = any(map(gating.plan.hybrid, gating.plan.covers))
        self._spread: Tensor | None = None  # the unit masks that MASK holds now
        self._flips = Flips()
        self._ranked = [index for index, gate in enumerate(gates) if gate.pattern is None]
        self._runs, fragment_gates = self._selection()
        num_units = [gates[i].num_units for i in self._ranked]
        self._selector = Selector(num_units, fragment_gates, self._communicator, gating.device)
        widest = max((gate.pattern[1] for gate in gates if gate.pattern), default=1)
        self._patterns = PatternSelector(list(pattern_runs(gating)), widest, self._communicator, gating.device)

    def make(self, keep: Sequence[int]) -> None:
        """Set every mask to the top `keep` units of its gate by score, and MASK to their product.

        Raises FloatingPointError, on every rank, if a score is NaN or infinite: no order of units is right then.
        """
        with self._communicator.stopwatch.measure("select"):
            self._check_finite()
            self._selector.masks_(self._runs, [keep[index] for index in self._ranked])
            self._make_patterns(keep)
            self._gating.unit_mask = self._communicator.union(self._gating.own_units)
        with self._communicator.stopwatch.measure("mask"):
            self._spread_units()

    def _check_finite(self) -> None:
        """One small all-reduce, and no copy of scores; gates are looked for only where one is to be named."""
        gating = self._gating
        buffers = [scores for part in gating.parts for scores in gating.flat_states(part, *self._score_keys)]
        buffers += [fragment.view(fragment.flat) for fragment in gating.own_scores]
        broken = torch.zeros((), dtype=torch.int32, device=gating.device)
        for scores in buffers:
            lowest, highest = torch.aminmax(scores)  # both NaN where any is
            broken += ~torch.isfinite(lowest) | ~torch.isfinite(highest)
        if self._communicator.sum_(broken).item():
            runs: list[_Run | PatternRun] = [*_ranked_runs(gating), *pattern_runs(gating)]
            mine = {
                gating.plan.gates[run.gate].name
                for run in runs
                if not torch.isfinite(run.scores.detach().view(-1)[run.offset : run.offset + run.length]).all()
            }
            names = sorted(set[str]().union(*self._communicator.gather(mine)))
            raise FloatingPointError(f"the scores of {', '.join(names)} hold NaN or infinity")

    def _make_patterns(self, keep: Sequence[int]) -> None:
        """The masks of n:m gates, of whose every m neighbours the same number is kept."""
        if len(self._ranked) < len(keep):
            kept = [
                num * gate.pattern[1] // gate.num_units if gate.pattern else 0
                for num, gate in zip(keep, self._gating.plan.gates, strict=True)
            ]
            self._patterns.masks_(kept)

    def _spread_units(self) -> None:
        """MASK = product of the masks of all gates that cover an element, where it is not made in place."""
        gating, new = self._gating, self._gating.unit_mask
        old = ~new if self._spread is None else self._spread
        for part in gating.parts:
            (mask,) = gating.flat_states(part, MASK)
            if self._hybrid:
                gating.times_units(mask.copy_(gating.element_masks(part)), part.patches)
            else:
                ops.expand_units_(part.patches, new, old, mask)
        self._spread = new

    def forget(self) -> None:
        """MASK was changed from outside: write all of it the next time."""
        self._spread = None

    def note_flips(self) -> None:
        """The next count of flips starts from the masks of now. Local."""
        self._flips.count(self._counted())

    def _counted(self, followers: bool = False) -> Iterator[Tensor]:
        """MASK where prunable weights lie on this rank: flat views, always the same. followers: biases too."""
        for part in self._gating.parts:
            (mask,) = self._gating.flat_states(part, MASK)
            yield from (mask[run] for run in (part.covered if followers else part.counted))

    def count_flips(self) -> int:
        """Prunable weights, on all ranks, whose MASK is another than when this was last called."""
        flips = torch.tensor(self._flips.count(self._counted()), device=self._gating.device)
        return int(self._communicator.sum_(flips).item())

    def count_kept(self, followers: bool = False) -> int:
        """Prunable weights that MASK keeps, on all ranks; followers: with biases that follow their units."""
        total = torch.zeros((), dtype=torch.int64, device=self._gating.device)
        for mask in self._counted(followers):
            total += torch.count_nonzero(mask)
        return int(self._communicator.sum_(total).item())

    def _selection(self) -> tuple[list[ScoreRuns], list[int]]:
        """The local runs of scores, and the gate of every run of all ranks, by place."""
        local = list(_ranked_runs(self._gating))
        everywhere = self._communicator.gather([(run.gate, run.first) for run in local])
        places = sorted(place for rank in everywhere for place in rank)
        order = {place: number for number, place in enumerate(places)}
        number = {gate: position for position, gate in enumerate(self._ranked)}
        size, device = ops.row_size(self._gating.device), self._gating.device
        buffers: dict[tuple[int, int], list[_Run]] = {}
        for run in local:
            buffers.setdefault((id(run.scores), id(run.mask)), []).append(run)
        made = []
        for runs in buffers.values():
            rows = [(run.offset, run.length, number[run.gate], order[run.gate, run.first]) for run in runs]
            scores, mask = runs[0].scores.detach().view(-1), runs[0].mask.view(-1)
            made.append(ScoreRuns(scores, mask, run_table(rows, size).to(device)))
        return made, [number[gate] for gate, _ in places]


class _Run(NamedTuple):
    """A run of scores on this rank: `length` from `offset` on of two buffers, for the units of `gate` from `first` on.

    Runs that share a buffer hold the same tensor objects.
    """

    scores: Tensor
    mask: Tensor
    offset: int
    length: int
    gate: int
    first: int


def score_runs(gating: Gating) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(gate, scores, mask) of every run on this rank, each of its length; n:m gates rank no units: left out."""
    for run in _ranked_runs(gating):
        own = slice(run.offset, run.offset + run.length)
        yield run.gate, run.scores.detach().view(-1)[own], run.mask.view(-1)[own]


def _ranked_runs(gating: Gating) -> Iterator[_Run]:
    """Of element scores, and of structured ones, whose mask goes to this rank's share of the units."""
    for f in gating.weights:
        for cover in gating.plan.covers[f.tensor]:
            gate = gating.plan.gates[cover.gate]
            if gate.elementwise and gate.pattern is None and SCORE in gating.keys:
                scores, mask = gating.buffer(f, SCORE), gating.buffer(f, gating.element_key)
                yield _Run(scores, mask, f.offset, f.length, cover.gate, f.start)
    for f in gating.own_scores:
        scores, mask = f.view(f.flat), gating.own_units[f.start : f.start + f.length]
        for index in gating.plan.structured:
            units = gating.plan.units(index)
            first, last = max(units.start, f.start), min(units.stop, f.start + f.length)
            if first < last:
                yield _Run(scores, mask, first - f.start, last - first, index, first - units.start)


def pattern_runs(gating: Gating, flat: Tensor | None = None) -> Iterator[PatternRun]:
    """The runs of scores under n:m gates on this rank, or of one of its flat partitions alone."""
    for f in gating.weights:
        if flat is not None and f.flat is not flat:
            continue
        for cover in gating.plan.covers[f.tensor]:
            if pattern := gating.plan.gates[cover.gate].pattern:
                scores, mask = gating.buffer(f, SCORE), gating.buffer(f, gating.element_key)
                yield PatternRun(cover.gate, f.start, f.length, pattern[1], scores, mask, f.offset)
