"""The rank pools themselves: collectives, errors, deaths, hangs, and reuse."""

from __future__ import annotations

import os
import pickle
import signal
import time

import pytest

from tests.ranks import RankError, RankPools

pytestmark = pytest.mark.slow


class Unpicklable(Exception):
    """Pickles, but cannot be built again from its args."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def summed_rank(factor: float) -> tuple[int, int, float, int]:
    """(rank, world size, sum over the ranks of factor * (rank + 1), threads)."""
    import torch
    import torch.distributed as dist

    value = torch.tensor([factor * (dist.get_rank() + 1)])
    dist.all_reduce(value)
    return dist.get_rank(), dist.get_world_size(), value.item(), torch.get_num_threads()


def process_id() -> int:
    return os.getpid()


def random_number() -> float:
    import torch

    return torch.rand(()).item()


def raise_on(rank: int | None) -> None:
    """Raises on the given rank (None: on all); the others wait for it in a collective."""
    import torch.distributed as dist

    if rank is None or dist.get_rank() == rank:
        raise ValueError(f"leap.target on rank {dist.get_rank()}")
    dist.barrier()


def raise_unpicklable() -> None:
    raise Unpicklable("half", "built")


def die_on(rank: int) -> None:
    import torch.distributed as dist

    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def die_after_an_error(rank: int) -> None:
    """Ranks whose connection is lost may say so before the death that is the cause is seen."""
    import torch.distributed as dist

    if dist.get_rank() != rank:
        raise RuntimeError("connection reset by peer")
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def hang_on(rank: int) -> None:
    import torch.distributed as dist

    if dist.get_rank() == rank:
        time.sleep(60)
    dist.barrier()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_ranks_take_part(ranks: RankPools, world_size: int) -> None:
    total = 0.5 * sum(range(1, world_size + 1))
    expected = [(rank, world_size, total, 1) for rank in range(world_size)]
    assert ranks(world_size).run(summed_rank, 0.5) == expected


def test_processes_are_reused_and_seeded_alike(ranks: RankPools) -> None:
    first = ranks(2).run(process_id)
    assert len({*first, os.getpid()}) == 3
    assert ranks(2).run(random_number) == ranks(2).run(random_number)
    assert ranks(2).run(process_id) == first


def test_exception_keeps_type_and_tells_rank_and_traceback(ranks: RankPools) -> None:
    with pytest.raises(ValueError, match=r"^leap\.target on rank 1") as caught:
        ranks(2).run(raise_on, 1)
    (note,) = caught.value.__notes__
    assert note.startswith("in rank 1:") and "in raise_on" in note
    assert ranks(2).run(summed_rank, 1.0)[0][2] == 3.0


def test_exception_on_all_ranks_keeps_the_processes(ranks: RankPools) -> None:
    before = ranks(2).run(process_id)
    with pytest.raises(ValueError, match=r"leap\.target") as caught:
        ranks(2).run(raise_on, None)
    assert len(caught.value.__notes__) == 2
    assert ranks(2).run(process_id) == before


def test_unpicklable_exception_is_told_by_name(ranks: RankPools) -> None:
    with pytest.raises(RankError, match="Unpicklable: halfbuilt"):
        ranks(1).run(raise_unpicklable)


def test_unpicklable_function_is_refused_before_a_call(ranks: RankPools) -> None:
    before = ranks(1).run(process_id)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        ranks(1).run(lambda: None)
    assert ranks(1).run(process_id) == before


def test_death_fails_at_once_and_the_pool_comes_back(ranks: RankPools) -> None:
    before = ranks(2).run(process_id)
    started = time.monotonic()
    with pytest.raises(RankError, match="rank 0 of 2 died with exit code -9"):
        ranks(2).run(die_on, 0)
    assert time.monotonic() - started < 10
    assert not set(ranks(2).run(process_id)) & set(before)


def test_a_death_is_the_cause_of_what_others_raise_before_it_is_seen(ranks: RankPools) -> None:
    with pytest.raises(RankError, match="rank 0 of 2 died with exit code -9") as caught:
        ranks(2).run(die_after_an_error, 0)
    (note,) = caught.value.__notes__
    assert note.startswith("in rank 1:") and "connection reset by peer" in note


def test_hang_fails_at_the_timeout(ranks: RankPools) -> None:
    with pytest.raises(RankError, match=r"no answer within 1 s from rank 0, 1 of 2"):
        ranks(2).run(hang_on, 1, timeout=1)
    assert ranks(2).run(summed_rank, 2.0)[1][2] == 6.0


def test_leaving_the_context_ends_every_process(ranks: RankPools) -> None:
    with RankPools() as pools:
        (pid,) = pools(1).run(process_id)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
