"""n:m masks over shards: the n best of every m neighbours in a row, ties to the lowest index.

Groups are aligned to multiples of m elements of their tensor, and a rank's run of elements may start or end inside
one. Such a group is shared by several ranks: its scores are summed into one small table, the same on every rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from leap_dist.core.communicator import Communicator
from leap_dist.ops import dispatch as ops
from leap_dist.ops.reference import run_table


@dataclass(frozen=True)
class PatternRun:
    """Elements [start, start + length) of the tensor of gate `gate`, in groups of `of`.

    They lie at `offset` of the flat partition, of whose shape are their scores, fp32, and their mask, bool.
    """

    gate: int
    start: int
    length: int
    of: int
    scores: Tensor
    mask: Tensor
    offset: int

    @property
    def body(self) -> tuple[int, int]:
        """(first, length) of the part of the run that is made of whole groups; empty where there is none."""
        first = min(-self.start % self.of, self.length)
        return first, max(0, self.length - first - (self.start + self.length) % self.of)

    def ends(self) -> Iterator[tuple[int, int]]:
        """(element of the tensor, its place in the flat buffers) for those in groups that the run cuts."""
        first, length = self.body
        for i in (*range(first), *range(first + length, self.length)):
            yield self.start + i, self.offset + i


class _Buffer(NamedTuple):
    """What one pair of flat buffers holds: the rows of whole groups; the elements of cut ones, and their slots."""

    scores: Tensor
    mask: Tensor
    table: Tensor
    places: Tensor
    slots: Tensor


class PatternSelector:
    """Selects for a fixed set of runs; collective, also at the start. widest: the largest m of any gate on any rank."""

    def __init__(
        self, runs: Sequence[PatternRun], widest: int, communicator: Communicator, device: torch.device
    ) -> None:
        self._communicator, self._device = communicator, device
        slot = shared_slots(runs, widest, communicator)
        self._num_shared = len(slot) * widest
        cut = {(run.gate, element // run.of): run.of for run in runs for element, _ in run.ends()}
        self._table = run_table([(slot[place], of, place[0], of) for place, of in cut.items()], widest).to(device)
        buffers = {id(run.scores): (run.scores, run.mask) for run in runs}
        self._buffers = []
        for key, (scores, mask) in buffers.items():
            mine = [run for run in runs if id(run.scores) == key]
            ends = ends_of(mine, slot, device)
            self._buffers.append(_Buffer(scores.view(-1), mask.view(-1), _whole_groups(mine, device), *ends))

    def masks_(self, kept: Sequence[int]) -> None:
        """Write the mask of every run; `kept`: n of every gate, for now. One host sync on a GPU.

        Raises FloatingPointError if a score is NaN.
        """
        num = torch.tensor(kept, dtype=torch.int64).to(self._device, non_blocking=True)
        shared = torch.zeros(self._num_shared, device=self._device)
        for buffer in self._buffers:
            shared[buffer.slots] = buffer.scores[buffer.places]
        self._communicator.sum_(shared)
        best = torch.empty_like(shared, dtype=torch.bool)
        broken = [ops.best_of_(self._table, shared, num, best)]
        for buffer in self._buffers:
            broken.append(ops.best_of_(buffer.table, buffer.scores, num, buffer.mask))
            buffer.mask[buffer.places] = best[buffer.slots]
        if torch.cat(broken).any():
            raise FloatingPointError("the scores of an n:m gate hold NaN")


def shared_slots(runs: Sequence[PatternRun], widest: int, communicator: Communicator) -> dict[tuple[int, int], int]:
    """Where a table has the groups that a run cuts, of `widest` slots each, by (gate, number of the group). Collective.

    It is the same on every rank, and so is its order.
    """
    cut = {(run.gate, element // run.of) for run in runs for element, _ in run.ends()}
    groups = sorted({place for rank in communicator.gather(sorted(cut)) for place in rank})
    return {place: number * widest for number, place in enumerate(groups)}


def ends_of(
    runs: Sequence[PatternRun], slot: Mapping[tuple[int, int], int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """(places in the flat buffers, slots of the shared table) of the elements in groups that runs cut."""
    ends = [
        (place, slot[run.gate, element // run.of] + element % run.of) for run in runs for element, place in run.ends()
    ]
    places, slots = torch.tensor(ends, dtype=torch.int64).view(-1, 2).to(device).unbind(1)
    return places, slots


def _whole_groups(runs: Sequence[PatternRun], device: torch.device) -> Tensor:
    """The rows of the whole groups of runs in one buffer, on its device."""
    size = ops.row_size(device)
    tables = [
        run_table([(run.offset + run.body[0], run.body[1], run.gate, run.of)], max(size // run.of, 1) * run.of)
        for run in runs
    ]
    return torch.cat(tables).to(device)
