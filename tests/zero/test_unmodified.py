"""The model that an engine hosts shows nothing of LEAP: its modules, its names, every file that DeepSpeed writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import leap_dist
from tests.ranks import RankPools

STEPS = 10


def bare() -> nn.Sequential:
    """A buffer, and matrices under both kinds of gates."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(20, 9), nn.Linear(9, 13), nn.LayerNorm(13), nn.Linear(13, 5), nn.Linear(5, 2))
    model.register_buffer("places", torch.arange(3))
    return model


def engine_of(model: nn.Module, stage: int, **more: Any) -> Any:
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    leap = {"target": 0.4, "total_steps": STEPS, "gates": ["element", "row"], "include": ["1.weight", "3.weight"]}
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, "leap": leap, **more}
    return leap_dist.initialize(model=model, config=config)[0]


def take(engine: Any, steps: int) -> None:
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for _ in range(steps):
        tokens = torch.randint(0, 20, (4,), generator=generator)
        engine.backward(engine(tokens).float().square().sum())
        engine.step()


def shown(folder: str, stage: int, bf16: bool) -> dict[str, Any]:
    """What is seen of a model in an engine, and of three files once they are read with strict loading."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from leap_dist.zero.engine import gather_weights

    model, plain = bare(), bare()
    engine = engine_of(model, stage, **({"bf16": {"enabled": True}} if bf16 else {}))
    take(engine, STEPS)
    leap_dist.finalize(engine)
    found = {
        "children": [type(child) for child in model.children()] == [type(child) for child in plain.children()],
        "length": len(model) == len(plain),
        "last": model[-1] is list(model)[4],
        "named": [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()],
        "attributes": vars(engine.module).keys() >= vars(plain).keys() and not hasattr(model, "leap"),
        "state_dict": model.state_dict().keys() == plain.state_dict().keys(),
    }
    engine.save_checkpoint(folder, tag="last")
    engine.save_16bit_model(folder, "whole.bin")
    weights = dict(gather_weights(engine))
    torch.distributed.barrier()
    files = {"saved": torch.load(Path(folder) / "whole.bin", weights_only=True)}
    if stage:
        files["zero_to_fp32"] = get_fp32_state_dict_from_zero_checkpoint(folder, "last")
    if stage < 3:
        state = torch.load(Path(folder) / "last" / "mp_rank_00_model_states.pt", weights_only=False)
        files["checkpoint"] = state["module"]
    for name, tensors in files.items():
        plain.load_state_dict(tensors, strict=True)
        found[name] = all(torch.equal(p.to(weights[n].dtype), weights[n]) for n, p in plain.named_parameters())
    leap_dist.release(model)
    leap_dist.release(model)
    engine.destroy()
    return found


@pytest.mark.parametrize(
    ("stage", "world", "bf16"), [(0, 1, False), (1, 2, False), (2, 2, True), (2, 1, False), (3, 2, False), (3, 1, True)]
)
def test_nothing_of_leap_shows_in_a_model_or_its_files(
    ranks: RankPools, tmp_path: Path, stage: int, world: int, bf16: bool
) -> None:
    for found in ranks(world).run(shown, str(tmp_path), stage, bf16):
        assert all(found.values()), found
        assert len(found) == 6 + (3 if 0 < stage < 3 else 2)


def test_a_model_with_an_attribute_of_leaps_name_is_hosted() -> None:
    model = bare()
    model.leap = nn.Linear(2, 2)
    leap_dist.host(model, torch.optim.AdamW(model.parameters()), {"leap": {"target": 0.5, "total_steps": 10}})
    leap_dist.release(model)
    assert isinstance(model.leap, nn.Linear)
