"""n:m masks over shards: the same as row by row on one rank, wherever the ranks' runs are cut."""

import pytest
import torch
from torch import Tensor

from leap_dist.core.communicator import Communicator
from leap_dist.core.oracle import top_k
from leap_dist.core.pattern import PatternRun, PatternSelector
from tests.ranks import RankPools

NUMEL = {0: 24, 1: 96, 2: 8}  # elements of the tensor of every gate; divisible by its m
OF, KEPT = {0: 4, 1: 8, 2: 4}, [2, 3, 1]


def scores_of(gate: int) -> Tensor:
    """Scores with many ties."""
    generator = torch.Generator().manual_seed(gate)
    return torch.randint(0, 4, (NUMEL[gate],), generator=generator).float()


def expected(gate: int) -> Tensor:
    return torch.stack([top_k(row, KEPT[gate]) for row in scores_of(gate).view(-1, OF[gate])]).flatten()


def masks_of_rank(cuts: list[list[int]]) -> list[tuple[int, int, Tensor]]:
    """(gate, start, mask) of the runs [cuts[gate][rank], cuts[gate][rank + 1]) of this rank; gate 0 has its own buffer.

    Runs lie three elements apart, and what lies between keeps its mask.
    """
    rank = torch.distributed.get_rank()
    places = [(gate, edges[rank], edges[rank + 1]) for gate, edges in enumerate(cuts)]
    buffers = [(torch.full((300,), float("nan")), torch.ones(300, dtype=torch.bool)) for _ in range(2)]
    runs, offset = [], 3
    for gate, first, last in places:
        if first < last:
            scores, mask = buffers[gate > 0]
            scores[offset : offset + last - first] = scores_of(gate)[first:last]
            runs.append(PatternRun(gate, first, last - first, OF[gate], scores, mask, offset))
            offset += last - first + 3
    communicator = Communicator(torch.distributed.group.WORLD)
    PatternSelector(runs, max(OF.values()), communicator, torch.device("cpu")).masks_(KEPT)
    assert all(mask[scores.isnan()].all() for scores, mask in buffers)
    return [(run.gate, run.start, run.mask[run.offset : run.offset + run.length].clone()) for run in runs]


@pytest.mark.parametrize(
    "cuts",
    [
        [[0, 24], [0, 96], [0, 8]],
        [[0, 11, 24], [0, 0, 96], [0, 5, 8]],
        [[0, 1, 3, 24], [0, 41, 47, 96], [0, 4, 8, 8]],  # three ranks share a group; a run inside one group
    ],
    ids=["one rank", "two ranks", "three ranks"],
)
def test_masks_equal_those_of_whole_rows(ranks: RankPools, cuts: list[list[int]]) -> None:
    whole = {gate: torch.zeros(numel, dtype=torch.int64) for gate, numel in NUMEL.items()}
    for result in ranks(len(cuts[0]) - 1).run(masks_of_rank, cuts):
        for gate, start, mask in result:
            whole[gate][start : start + len(mask)] += mask
    assert all(torch.equal(whole[gate], expected(gate).long()) for gate in NUMEL)


def test_nan_scores_are_an_error() -> None:
    scores, mask = torch.tensor([1.0, 0.0, 2.0, float("nan")]), torch.zeros(4, dtype=torch.bool)
    for of in (2, 8):  # in a whole group, in one that the run cuts
        selector = PatternSelector([PatternRun(0, 0, 4, of, scores, mask, 0)], of, Communicator(), torch.device("cpu"))
        with pytest.raises(FloatingPointError, match="NaN"):
            selector.masks_([1])
