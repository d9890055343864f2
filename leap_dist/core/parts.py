"""Parts: what one flat buffer holds of gated tensors, as tables of runs and of patches (ops/), made once."""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from leap_dist.core.fragments import Fragment
from leap_dist.core.gates import GatePlan
from leap_dist.ops.dispatch import row_size
from leap_dist.ops.reference import GATE, run_table
from leap_dist.ops.slices import Slice


class Part:
    """The tables of one flat buffer: of runs on its device, of patches on the CPU.

    updated: the runs of all weights; elements: of those under an element gate, and num_rows, how many rows each gate
    has there, (G,); structured: of the rest. patches: of all structured gates; alone: of those on tensors that no
    other gate covers; joint: of those on tensors that several gates cover, for every number of a cover its patches and
    those of the other structured gates on the same tensors. counted: where prunable weights lie; covered:
    where biases that follow units lie too. Tensors in `no_decay` have no weight decay.
    """

    def __init__(self, plan: GatePlan, flat: Tensor, fragments: Sequence[Fragment], no_decay: Collection[str]) -> None:
        self.flat, self.device = flat, flat.device
        self._plan, self._no_decay = plan, no_decay
        under = [f for f in fragments if self._element_cover(f) is not None]
        plain = [f for f in fragments if self._element_cover(f) is None]
        self.updated, self.elements, self.structured = (self._table(chosen) for chosen in (fragments, under, plain))
        self.num_rows = torch.bincount(self.elements[:, GATE], minlength=len(plan.gates))
        by_gate: dict[int, list[Fragment]] = {}
        for fragment in plain:
            if not plan.hybrid(fragment.tensor):
                by_gate.setdefault(plan.covers[fragment.tensor][0].gate, []).append(fragment)
        self.alone = self._patches((f, 0) for covered in by_gate.values() for f in covered)
        self.joint = self._joint([f for f in fragments if plan.hybrid(f.tensor)])
        self.patches = torch.cat([self.alone, *(own for own, _ in self.joint)]) if self.joint else self.alone
        self.counted = _merged((f.offset, f.length) for f in fragments if plan.counted(f.tensor))
        self.covered = _merged((f.offset, f.length) for f in fragments)

    def _joint(self, hybrid: Sequence[Fragment]) -> list[tuple[Tensor, Tensor]]:
        """(patches of the structured covers of a number, patches of the other structured covers) by number."""
        found = []
        for number in range(max((len(self._plan.covers[f.tensor]) for f in hybrid), default=0)):
            mine = [f for f in hybrid if number in self._structured_covers(f)]
            if mine:
                rest = ((f, other) for f in mine for other in self._structured_covers(f) if other != number)
                found.append((self._patches((f, number) for f in mine), self._patches(rest)))
        return found

    def _element_cover(self, fragment: Fragment) -> int | None:
        """Which of a fragment's covers belongs to an element gate."""
        covers = self._plan.covers[fragment.tensor]
        return next((i for i, cover in enumerate(covers) if self._plan.gates[cover.gate].elementwise), None)

    def _structured_covers(self, fragment: Fragment) -> list[int]:
        """Which of a fragment's covers belong to structured gates."""
        return [i for i in range(len(self._plan.covers[fragment.tensor])) if i != self._element_cover(fragment)]

    def _patches(self, covers: Iterable[tuple[Fragment, int]]) -> Tensor:
        """The patches of every (fragment, number of its cover)."""
        rows: list[tuple[Fragment, Slice, int]] = []
        for fragment, number in covers:
            cover = self._plan.covers[fragment.tensor][number]
            rows += [(fragment, part, self._plan.units(cover.gate).start) for part in cover.slices]
        return patch_table(rows)

    def _table(self, fragments: Sequence[Fragment]) -> Tensor:
        """The runs of fragments, by the element gate that covers each, or its first gate."""
        runs = []
        for f in fragments:
            gate = self._plan.covers[f.tensor][self._element_cover(f) or 0].gate
            runs.append((f.offset, f.length, gate, int(f.tensor not in self._no_decay)))
        return run_table(sorted(runs, key=lambda run: run[2]), row_size(self.device)).to(self.device)

    @property
    def grad(self) -> Tensor | None:
        """The flat gradient, None where no backward pass has left one."""
        return None if self.flat.grad is None else self.flat.grad.view(-1)

    @property
    def hosted(self) -> Tensor:
        """The flat buffer itself, W * M."""
        return self.flat.detach().view(-1)


def _merged(runs: Iterable[tuple[int, int]]) -> list[slice]:
    """Runs (offset, length) as slices, neighbours joined."""
    found: list[slice] = []
    for offset, length in sorted(runs):
        start = found.pop().start if found and found[-1].stop == offset else offset
        found.append(slice(start, offset + length))
    return found


def patch_table(covered: Sequence[tuple[Fragment, Slice, int]]) -> Tensor:
    """A row for every (fragment, slice, place of the gate's first unit), int64 of shape (patches, 12), on the CPU."""
    rows = [
        (f.offset, f.start, f.length, s.rows, s.cols, *s.bounds, s.block_rows, s.block_cols, first + s.first_unit)
        for f, s, first in covered
    ]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 12)
