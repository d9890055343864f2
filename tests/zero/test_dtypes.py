"""Models in bf16 and fp16: whatever dtype a file has, runs are exact, and scores and thresholds have fp32 masters."""

from __future__ import annotations

import logging.handlers
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.ecosystem.test_trainer import AUTO, make_trainer
from tests.ecosystem.tiny import accelerate_left_behind
from tests.peers.nets import GLOBAL_BATCH, LR, batches, loss_of, net
from tests.ranks import RankPools

STEPS = 20
CASES = [
    (dtype, section, stage)
    for dtype, section in (("bfloat16", None), ("bfloat16", "bf16"), ("float16", None), ("float16", "bf16"))
    for stage in (1, 2, 3)
]


def run(dtype: str, section: str | None, stage: int) -> dict[str, Any]:
    """A run of a model of that dtype; under "init" it is built sharded, in bf16."""
    import deepspeed

    import leap_dist

    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    size = GLOBAL_BATCH // ranks
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": size, "zero_optimization": {"stage": stage}}
    config |= {section: {"enabled": True}} if section else {}
    if dtype == "init":
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = net()
    else:
        model = net().to(getattr(torch, dtype))
    config["leap"] = {"target": 0.2, "total_steps": STEPS}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    engine, *_ = leap_dist.initialize(model=model, config=config, optimizer=optimizer)
    hosted = next(engine.module.parameters()).dtype
    for x, y in batches(STEPS):
        engine.backward(loss_of(engine(x[rank * size :][:size].to(hosted)), y[rank * size :][:size]))
        engine.step()
    certificate = leap_dist.finalize(engine)
    thresholds = engine.leap.gating.gather_thresholds()
    engine.destroy()
    return {
        "kept": certificate["kept"],
        "asked": certificate["target"] * certificate["prunable"],
        "masks": certificate["masks_sha256"],
        "dtype": str(hosted),
        "masters": {str(flat.dtype) for flat in engine.leap.state},
        "finer than bf16": not torch.equal(thresholds, thresholds.bfloat16().float()),
    }


def check(found: list[dict[str, Any]], dtype: str) -> None:
    assert all(other == found[0] for other in found)
    assert abs(found[0]["kept"] - found[0]["asked"]) <= 1
    assert found[0]["dtype"] == dtype
    assert found[0]["masters"] == {"torch.float32"}
    assert found[0]["finer than bf16"]


@pytest.mark.parametrize(("dtype", "section", "stage"), CASES)
def test_a_file_in_low_precision_runs_exactly(ranks: RankPools, dtype: str, section: str | None, stage: int) -> None:
    check(ranks(2).run(run, dtype, section, stage), "torch.bfloat16" if section else f"torch.{dtype}")


def test_a_model_built_sharded_in_bf16_runs_exactly(ranks: RankPools) -> None:
    check(ranks(2).run(run, "init", "bf16", 3), "torch.bfloat16")


def said_of_bf16(section: str | None, has_it: bool) -> list[str]:
    """What is logged of a run's dtype, on a CPU that has or has not instructions for bf16."""
    said = logging.handlers.BufferingHandler(100)
    logger = logging.getLogger("leap_dist.zero.engine")
    logger.addHandler(said)
    with patch.object(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_it):
        run("bfloat16", section, 1)
    logger.removeHandler(said)
    return [record.getMessage() for record in said.buffer]


@pytest.mark.parametrize(("section", "has_it"), [("bf16", False), ("bf16", True), (None, False)])
def test_a_cpu_that_is_slow_in_bf16_is_reported_once(ranks: RankPools, section: str | None, has_it: bool) -> None:
    first, other = ranks(2).run(said_of_bf16, section, has_it)
    assert (
        first
        == (["bf16.enabled: this CPU has no instructions for bf16, and is some 8 times faster in fp32"])[
            : section is not None and not has_it
        ]
    )
    assert other == []


def train_in_bf16(folder: str, stage: int) -> dict[str, Any]:
    import leap_dist

    with accelerate_left_behind():
        zero = {"stage": stage, "reduce_bucket_size": "auto"}
        config = {**AUTO, "zero_optimization": zero, "bf16": {"enabled": "auto"}, "leap": {"target": 0.25}}
        trainer = make_trainer(folder, stage, None, deepspeed=config, bf16=True)
        leap = leap_dist.LeapCallback(trainer)
        trainer.train()
        masters = {str(flat.dtype) for flat in trainer.deepspeed.leap.state}
        trainer.deepspeed.destroy()
    assert leap.certificate is not None
    return {"kept": leap.certificate["kept"], "prunable": leap.certificate["prunable"], "masters": masters}


def test_a_trainer_in_bf16_under_stage_3_is_exact(ranks: RankPools, tmp_path: Path) -> None:
    found = ranks(2).run(train_in_bf16, str(tmp_path), 3)
    assert found == [{"kept": 4096, "prunable": 16384, "masters": {"torch.float32"}}] * 2
