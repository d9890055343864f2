"""Mask flips equal a count over whole masks, on one rank and over shards."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from leap_dist.core import flips
from leap_dist.core.flips import Flips, num_bits, pack
from tests.ranks import RankPools
from tests.zero.test_engine import STEPS, pruned_engine, run_steps


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 63, 64, 1000])
def test_bits_are_packed_as_numpy_packs_them(length: int) -> None:
    mask = torch.rand(length + 3)[3:] < 0.3  # starts anywhere in its storage
    assert pack(mask).numpy().tobytes() == np.packbits(mask.numpy(), bitorder="little").tobytes()
    assert num_bits(pack(mask)) == int(mask.sum())
    assert num_bits(torch.arange(256, dtype=torch.uint8)) == 8 * 128


def test_what_changed_since_the_last_call_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flips, "CHUNK", 16)
    torch.manual_seed(0)
    counter, before = Flips(), [torch.ones(n, dtype=torch.bool) for n in (5, 0, 100, 16)]
    for density in (1.0, 0.5, 0.5, 0.1):
        masks = [torch.rand(len(mask)) < density for mask in before]
        assert counter.count(masks) == sum(int((a != b).sum()) for a, b in zip(masks, before, strict=True))
        assert counter.count(masks) == 0
        before = masks


def reported_and_counted(kind: str, stage: int) -> list[tuple[float, int]]:
    """mask_flips, and how many entries of whole masks changed, between three reports."""
    from leap_dist.zero.engine import gather_masks

    engine = pruned_engine(kind, stage, 1, {})
    plan, found, done = engine.leap.plan, [], 0
    before: dict[str, torch.Tensor] = {}
    for last in (STEPS // 3, STEPS // 2, STEPS):
        run_steps(engine, 1, done, last)
        done = last
        reported = engine.leap.measures()["mask_flips"]
        masks = {name: mask.clone() for name, mask in gather_masks(engine) if mask is not None}
        counted = [
            mask != before.get(name, torch.ones_like(mask)) for name, mask in masks.items() if plan.counted(name)
        ]
        found.append((reported, sum(int(changed.sum()) for changed in counted)))
        before = masks
    engine.destroy()
    return found


@pytest.mark.parametrize(("kind", "stage"), [("hybrid", 3), ("element", 2)])
def test_a_report_counts_over_all_shards(ranks: RankPools, kind: str, stage: int) -> None:
    first, second = ranks(2).run(reported_and_counted, kind, stage)
    assert all(reported == counted for reported, counted in first)
    assert [reported for reported, _ in first] == [reported for reported, _ in second]
    assert all(counted > 0 for _, counted in first)
