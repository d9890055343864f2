"""Rates and memory of a run."""

from __future__ import annotations

import time

import pytest
import torch

from leap_dist.train.meter import RATES, Meter
from leap_dist.zero.ranks import Ranks
from tests.ranks import RankPools


def rates(steps: int) -> dict[str, float]:
    """Of a rank whose batches have 10 tokens more than those of the rank before."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    meter = Meter(Ranks(rank, world, torch.device("cpu")), step=5)
    for read_at in (5 + steps, 5 + 2 * steps):
        for _ in range(steps):
            meter.count({"input_ids": torch.zeros(2, 5 * (rank + 1), dtype=torch.int64)})
        time.sleep(0.01)
        found = meter.read(read_at)
    return found


def test_tokens_of_all_ranks_are_counted_between_two_readings(ranks: RankPools) -> None:
    for found in ranks(2).run(rates, 4):
        assert found.keys() == set(RATES) - {"cuda_memory_mb"}
        assert found["tokens_per_second"] / found["steps_per_second"] == pytest.approx(10 + 20)
        assert 0 < found["steps_per_second"] <= 4 / 0.01 and found["memory_mb"] > 10
