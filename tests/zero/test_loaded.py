"""Weights that are loaded after initialize are all taken over, or refused: never some of them, never in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import leap_dist
from leap_dist.errors import UserError
from leap_dist.zero.binding import refresh_hosted
from tests.peers.nets import leap, net
from tests.ranks import RankPools
from tests.zero.test_engine import engine_config, run_steps, schedule

STEPS = 14


def other() -> nn.Module:
    """The test net with other weights, which bf16 holds exactly."""
    model = net("hybrid")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 1.5 + 0.01).bfloat16())
    return model


def engine_of(model: nn.Module, stage: int, **more: Any) -> Any:
    section = leap("hybrid", STEPS).model_dump(mode="json")
    config = engine_config(stage, 1, torch.distributed.get_world_size(), section, **more)
    return leap_dist.initialize(model=model, config=config, lr_scheduler=schedule)[0]


def load(engine: Any, way: str, stage: int, folder: str) -> None:
    """Put the other weights into an engine."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param

    weights: dict[str, Tensor] = other().state_dict()
    if way == "masters":
        for name, parameter in engine.module.named_parameters():
            safe_set_full_fp32_param(parameter, weights[name])
        refresh_hosted(engine)  # DeepSpeed does so after the first step only
    elif way == "a checkpoint's module":
        engine.load_checkpoint(folder, load_module_only=True)
    elif way == "a checkpoint without the optimizer":
        engine.load_checkpoint(folder, load_optimizer_states=False)
    elif stage < 3:
        engine.module.load_state_dict(weights)
    else:
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                engine.module.load_state_dict(weights)


def loaded(way: str, stage: int, folder: str, bf16: bool) -> tuple[str, str, str]:
    """Hashes of a run from weights that were loaded, and of one whose model had them; what loading later says."""
    more: dict[str, Any] = {"bf16": {"enabled": True}} if bf16 else {}
    if stage == 1:
        more["data_types"] = {"grad_accum_dtype": "fp32"}  # an optimizer of DeepSpeed's own
    dtype = torch.bfloat16 if bf16 else torch.float32
    engine = engine_of(other(), stage, **more)
    engine.save_checkpoint(folder)
    run_steps(engine, 1, 0, STEPS, dtype)
    expected = leap_dist.finalize(engine)["weights_sha256"]
    engine.destroy()
    engine = engine_of(net("hybrid"), stage, **more)
    load(engine, way, stage, folder)
    run_steps(engine, 1, 0, STEPS, dtype)
    found = leap_dist.finalize(engine)["weights_sha256"]
    engine.destroy()
    engine = engine_of(net("hybrid"), stage, **more)
    run_steps(engine, 1, 0, 5, dtype)
    load(engine, way, stage, folder)
    with pytest.raises(UserError) as refusal:
        run_steps(engine, 1, 5, 6, dtype)
    engine.destroy()
    return found, expected, str(refusal.value)


@pytest.mark.parametrize(
    ("way", "stage", "world", "bf16"),
    [
        ("the module", 0, 2, False),
        ("the module", 1, 2, True),
        ("the module", 2, 1, False),
        ("the module", 3, 2, True),
        ("masters", 2, 2, False),
        ("masters", 3, 1, False),
        ("a checkpoint's module", 0, 1, False),
        ("a checkpoint's module", 2, 2, True),
        ("a checkpoint without the optimizer", 3, 2, False),
    ],
)
def test_loaded_weights_are_the_start_or_refused(
    ranks: RankPools, tmp_path: Path, way: str, stage: int, world: int, bf16: bool
) -> None:
    for found, expected, refusal in ranks(world).run(loaded, way, stage, str(tmp_path), bf16):
        assert found == expected
        assert refusal.startswith("weights: they were changed after the last step, and the next one would undo that")


def exchanged(stage: int) -> bool:
    """Whether a run whose weights are exchanged for averages at every evaluation ends like one without."""
    hashes = []
    for evaluates in (False, True):
        engine = engine_of(net("hybrid"), stage)
        for step in range(STEPS):
            run_steps(engine, 1, step, step + 1)
            if evaluates:
                kept = [p.detach().clone() for p in engine.module.parameters()]
                for parameter in engine.module.parameters():
                    parameter.data.mul_(0.5)
                for parameter, before in zip(engine.module.parameters(), kept, strict=True):
                    parameter.data.copy_(before)
        hashes.append(leap_dist.finalize(engine)["weights_sha256"])
        engine.destroy()
    return hashes[0] == hashes[1]


def test_weights_that_are_put_back_before_the_step_change_nothing(ranks: RankPools) -> None:
    assert ranks(1).run(exchanged, 0) == ranks(1).run(exchanged, 2) == [True]
