"""n:m masks over shards: the same as row by row on one rank, wherever the ranks' runs are cut."""

import pytest
import torch
from torch import Tensor

from leap_dist.core.communicator import Communicator
from leap_dist.core.oracle import top_k
from leap_dist.ops.pattern import PatternRun, PatternSelector, best_of
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
    """(gate, start, mask) of the runs [cuts[gate][rank], cuts[gate][rank + 1]) of this rank."""
    rank = torch.distributed.get_rank()
    places = [(gate, edges[rank], edges[rank + 1]) for gate, edges in enumerate(cuts)]
    runs = [PatternRun(g, a, scores_of(g)[a:b].clone(), OF[g]) for g, a, b in places if a < b]
    selector = PatternSelector(runs, max(OF.values()), Communicator(torch.distributed.group.WORLD))
    masks = selector.masks(KEPT)
    return [(run.gate, run.start, mask) for run, mask in zip(runs, masks, strict=True)]


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


@pytest.mark.parametrize("num", [0, 1, 3, 5])
def test_ties_go_to_the_lowest_index(num: int) -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, -0.0, 0.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    assert torch.equal(best_of(scores, num), torch.stack([top_k(row, num) for row in scores]))


def test_nan_scores_are_an_error() -> None:
    with pytest.raises(FloatingPointError, match="NaN"):
        best_of(torch.tensor([[1.0, float("nan")]]), 1)
