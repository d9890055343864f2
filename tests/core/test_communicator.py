"""Sums and unions over ranks."""

import pytest
import torch

from leap_dist.core.communicator import Communicator
from tests.ranks import RankPools

SIZES = [0, 1, 7, 8, 9, 1001]


def unite(size: int) -> tuple[bool, int]:
    """On every rank: is the union of flags dealt like cards what it should be, and how many bytes did it take?"""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    communicator = Communicator(torch.distributed.group.WORLD) if world > 1 else Communicator()
    expected = torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.6
    mine = expected & (torch.arange(size) % world == rank)
    before = mine.clone()
    got = communicator.union(mine)
    fresh = got.dtype == torch.bool and (size == 0 or got.data_ptr() != mine.data_ptr())
    return fresh and torch.equal(got, expected) and torch.equal(mine, before), communicator.num_bytes


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("size", SIZES)
def test_a_union_is_sent_as_bits(ranks: RankPools, world: int, size: int) -> None:
    sent = -(-size // 8) if world > 1 else 0
    assert ranks(world).run(unite, size) == [(True, sent)] * world
