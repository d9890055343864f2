"""Parameters that only some steps use: their gradient is zero in the others, at every stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import RankPools

ENGINES = [(0, False), (1, False), (3, False), (1, True), (3, True)]
"""ZeRO stages, and whether the optimizer's state is offloaded."""


class Sometimes(nn.Module):
    """With layers beside the others that are used where `odd` says so, as experts and dropped layers are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.side = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(8, 3)
        self.odd = False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.first(x)))
        return y + self.side(x) if self.odd else y


def ends(stage: int, offload: bool, accumulated: int) -> tuple[dict[str, Tensor], str]:
    """Weights and masks after nine steps; the side layer is used in every third one, in its last micro-batch."""
    import leap_dist
    from leap_dist.zero.engine import gather_weights

    torch.manual_seed(1)
    model = Sometimes()
    zero: dict[str, Any] = {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if offload else {})
    leap = {"target": 0.4, "total_steps": 20, "include": ["first.weight", "side.weight"]}
    config = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": accumulated}
    config |= {"zero_optimization": zero, "leap": leap}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = leap_dist.initialize(model=model, optimizer=optimizer, config=config)[0]
    random = torch.Generator().manual_seed(torch.distributed.get_rank())
    for step in range(9):
        for micro in range(accumulated):
            engine.module.odd = step % 3 == 2 and micro == accumulated - 1
            engine.backward(engine(torch.randn(4, 8, generator=random)).square().mean())
            engine.step()
    weights = {name: weight.clone() for name, weight in gather_weights(engine)}
    return weights, leap_dist.finalize(engine)["masks_sha256"]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_what_a_step_does_not_use_has_no_gradient_at_any_stage(
    ranks: RankPools, world_size: int, accumulated: int
) -> None:
    found = [ranks(world_size).run(ends, *engine, accumulated)[0] for engine in ENGINES]
    expected, masks = found[0]
    for weights, others in found[1:]:
        assert others == masks
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)
