"""n:m masks over shards: the n best of every m neighbours in a row, ties to the lowest index.

Groups are aligned to multiples of m elements of their tensor, and a rank's run of elements may start or end inside
one. Such a group is shared by several ranks: its scores are summed into one small table, the same on every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from leap_dist.core.communicator import Communicator
from leap_dist.ops.reference import blocks


@dataclass(frozen=True)
class PatternRun:
    """Elements [start, start + n) of the tensor of gate `gate`, with their scores (n,), in groups of `of`."""

    gate: int
    start: int
    scores: Tensor
    of: int

    @property
    def body(self) -> slice:
        """The part of the run that is made of whole groups; empty where there is none."""
        first = min(-self.start % self.of, len(self.scores))
        return slice(first, max(first, len(self.scores) - (self.start + len(self.scores)) % self.of))

    def ends(self) -> list[tuple[int, slice]]:
        """(group, part of the run) of the cut groups at either end."""
        stop = len(self.scores)
        parts = [slice(0, self.body.start), slice(self.body.stop, stop)]
        return [((self.start + part.start) // self.of, part) for part in parts if part.start < part.stop]


class PatternSelector:
    """Selects for a fixed set of runs; collective, also at the start. widest: the largest m of any gate on any rank."""

    def __init__(self, runs: Sequence[PatternRun], widest: int, communicator: Communicator) -> None:
        self._runs, self._communicator = list(runs), communicator
        cut = [(run.gate, group) for run in self._runs for group, _ in run.ends()]
        everywhere = communicator.gather(cut)
        groups = sorted({place for rank in everywhere for place in rank})
        self._slot = {place: slot for slot, place in enumerate(groups)}
        self._widest = widest

    def masks(self, kept: Sequence[int]) -> list[Tensor]:
        """The bool mask of every run, shape of its scores; `kept`: n of every gate, for now.

        Raises FloatingPointError if a score is NaN.
        """
        table = self._shared_scores()
        masks = []
        for run in self._runs:
            mask, num = torch.empty_like(run.scores, dtype=torch.bool), kept[run.gate]
            whole = run.scores[run.body]
            for b in blocks(whole.numel() // run.of, whole.device):
                part = slice(b.start * run.of, b.stop * run.of)
                mask[run.body][part] = best_of(whole[part].view(-1, run.of), num).flatten()
            for group, part in run.ends():
                best = best_of(table[self._slot[run.gate, group], : run.of][None], num)[0]
                offset = (run.start + part.start) % run.of
                mask[part] = best[offset : offset + part.stop - part.start].to(mask.device)
            masks.append(mask)
        return masks

    def _shared_scores(self) -> Tensor:
        """(cut groups, m): the scores of all groups that ranks share, fp32 on the CPU."""
        table = torch.zeros(len(self._slot), self._widest)
        for run in self._runs:
            for group, part in run.ends():
                offset = (run.start + part.start) % run.of
                row = table[self._slot[run.gate, group]]
                row[offset : offset + part.stop - part.start] = run.scores[part].cpu()
        return self._communicator.sum_(table)


def best_of(scores: Tensor, num: int) -> Tensor:
    """The mask of the `num` largest of every row, ties to the lowest index; scores: (groups, m), bool of its shape.

    An element's rank is the number of those in its row that go before it: m comparisons, and no sort.
    """
    rank = torch.zeros_like(scores, dtype=torch.int16)
    for i in range(scores.shape[1]):
        one = scores[:, i : i + 1]
        rank[:, :i] += one > scores[:, :i]
        rank[:, i + 1 :] += one >= scores[:, i + 1 :]
    mask = rank < num
    if scores.isnan().any():
        raise FloatingPointError("the scores of an n:m gate hold NaN")
    return mask
