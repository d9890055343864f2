"""What loops of one's own do to an engine and its model, that plain DeepSpeed runs: run, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import leap_dist
from leap_dist.errors import UserError
from leap_dist.zero.engine import gather_weights
from tests.ranks import RankPools

STEPS = 10


class Net(nn.Module):
    """Two gated layers, one gated that takes no part and gets no gradient, an ungated one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.idle = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.rest, self.head = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rest(torch.tanh(self.second(torch.tanh(self.first(x))))))


def engine_of(stage: int, left_out: str = "rest") -> Any:
    """Its optimizer leaves out the parameters of one layer, which are not frozen."""
    model = Net()
    leap = {"target": 0.4, "total_steps": STEPS, "gates": ["element", "row"], "exclude": ["rest.weight", "head.weight"]}
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}, "leap": leap}
    trained = [p for name, p in model.named_parameters() if not name.startswith(left_out)]
    return leap_dist.initialize(model=model, optimizer=torch.optim.AdamW(trained, lr=0.01), config=config)[0]


def take(engine: Any, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 * step + torch.distributed.get_rank())
        engine.backward(engine(torch.randn(4, 8, generator=generator)).square().mean())
        engine.step()


def partly(stage: int, folder: str) -> bool:
    """A run that trains a part ends alike from its start and from its middle, loaded where other steps were taken; and
    once its model is frozen."""
    plain = Net().state_dict()
    engine = engine_of(stage)
    engine.save_checkpoint(folder, tag="start")
    take(engine, 0, 5)
    engine.save_checkpoint(folder, tag="middle")
    take(engine, 5, STEPS)
    whole = leap_dist.finalize(engine)
    weights = dict(gather_weights(engine))
    changed = {name.split(".")[0] for name, weight in weights.items() if not torch.equal(weight, plain[name])}
    assert changed == {"first", "second", "idle", "head"}, changed
    engine.destroy()
    engine = engine_of(stage)
    found = []
    for tag, first in (("middle", 5), ("start", 0)):
        take(engine, 2, 4)
        engine.load_checkpoint(folder, tag=tag)
        take(engine, first, STEPS)
        found.append(leap_dist.finalize(engine))
    engine.module.requires_grad_(False)
    found.append(leap_dist.finalize(engine))
    engine.destroy()
    return found == [whole] * 3


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (0, 2), (1, 1), (2, 2), (3, 2)])
def test_what_the_optimizer_was_not_given_is_not_trained(
    ranks: RankPools, tmp_path: Path, stage: int, world: int
) -> None:
    assert all(ranks(world).run(partly, stage, str(tmp_path)))


def replaced(stage: int) -> list[str]:
    """What finalize says of a model whose layers were replaced after initialize: nothing of one that is not gated."""
    messages = []
    for name in ("rest", "second"):
        engine = engine_of(stage)
        take(engine, 0, 1)
        setattr(engine.module, name, nn.Linear(12, 8 if name == "rest" else 12))
        take(engine, 1, STEPS)
        try:
            leap_dist.finalize(engine)
            messages.append("")
        except UserError as error:
            messages.append(str(error))
        engine.destroy()
    return messages


def test_a_gated_layer_that_was_replaced_is_named(ranks: RankPools) -> None:
    fine, message = ranks(1).run(replaced, 0)[0]
    assert fine == "" and message.startswith("model: second.bias is not the parameter that was pruned: it was replaced")
