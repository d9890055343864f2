"""Parts: what one flat buffer holds of gated tensors, as tables of runs and of patches (ops/)."""

from collections.abc import Collection, Sequence

from torch import Tensor

from leap_dist.core.fragments import Fragment
from leap_dist.core.gates import GatePlan, Slice
from leap_dist.ops.dispatch import row_size
from leap_dist.ops.reference import run_table
from leap_dist.ops.units import patch_table


class Part:
    """The tables of one flat buffer: of runs on its device, of patches on the CPU.

    updated: the runs of all weights; elements, hybrids: of those under an element gate, alone or with other gates;
    structured: of the rest. patches: for every structured gate those of the tensors that it covers alone. hybrid: the
    fragments that several gates cover. Tensors in `no_decay` have no weight decay.
    """

    def __init__(self, plan: GatePlan, flat: Tensor, fragments: Sequence[Fragment], no_decay: Collection[str]) -> None:
        self.flat, self.device = flat, flat.device
        self._plan, self._no_decay = plan, no_decay
        under = [f for f in fragments if self.element_cover(f) is not None]
        plain = [f for f in fragments if self.element_cover(f) is None]
        self.hybrid = [f for f in fragments if plan.hybrid(f.tensor)]
        self.updated, self.structured = self._table(fragments), self._table(plain)
        self.elements = self._table([f for f in under if not plan.hybrid(f.tensor)])
        self.hybrids = self._table([f for f in under if plan.hybrid(f.tensor)])
        alone: dict[int, list[Fragment]] = {}
        for fragment in plain:
            if not plan.hybrid(fragment.tensor):
                alone.setdefault(plan.covers[fragment.tensor][0].gate, []).append(fragment)
        self.patches = {gate: self.patch_table(covered, 0) for gate, covered in alone.items()}

    def element_cover(self, fragment: Fragment) -> int | None:
        """Which of a fragment's covers belongs to an element gate."""
        covers = self._plan.covers[fragment.tensor]
        return next((i for i, cover in enumerate(covers) if self._plan.gates[cover.gate].elementwise), None)

    def patch_table(self, fragments: Sequence[Fragment], number: int) -> Tensor:
        """The patches of every fragment's cover of this number."""
        rows: list[tuple[Fragment, Slice, int]] = []
        for fragment in fragments:
            cover = self._plan.covers[fragment.tensor][number]
            rows += [(fragment, part, self._plan.units(cover.gate).start) for part in cover.slices]
        return patch_table(rows)

    def _table(self, fragments: Sequence[Fragment]) -> Tensor:
        """The runs of fragments, by the element gate that covers each, or its first gate."""
        runs = []
        for f in fragments:
            gate = self._plan.covers[f.tensor][self.element_cover(f) or 0].gate
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
