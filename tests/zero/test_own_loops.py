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


class Scaled(nn.Module):
    """Two gated layers, and a group of one number, of which the second rank holds nothing but padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(8, 12, bias=False), nn.Linear(12, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) * self.scale


def scaled_engine(stage: int) -> Any:
    leap = {"target": 0.4, "total_steps": STEPS, "include": ["first.weight", "second.weight"]}
    train = {"learning_rate": 0.01, "weight_decay": 0.1}
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}, "train": train, "leap": leap}
    return leap_dist.initialize(model=Scaled(), config=config)[0]


def scaled(folder: str) -> dict[int, tuple[dict[str, Tensor], bool]]:
    """By stage: the weights in the end, and whether runs from both kinds of checkpoints end with the same bits."""
    found = {}
    for stage in range(4):
        engine, checkpoints = scaled_engine(stage), leap_dist.Checkpoints(f"{folder}/ours-{stage}")
        take(engine, 0, 5)
        checkpoints.save(engine, {"step": 5})
        checkpoints.wait()
        engine.save_checkpoint(f"{folder}/host-{stage}", tag="middle")
        take(engine, 5, STEPS)
        whole, weights = leap_dist.finalize(engine), dict(gather_weights(engine))
        ends = []
        for ours in (True, False):
            engine.destroy()
            engine = scaled_engine(stage)
            if ours:
                assert checkpoints.load(engine) == {"step": 5}
            else:
                engine.load_checkpoint(f"{folder}/host-{stage}", tag="middle")
            take(engine, 5, STEPS)
            ends.append(leap_dist.finalize(engine))
        engine.destroy()
        found[stage] = weights, ends == [whole] * 2
    return found


def test_a_group_that_a_rank_holds_only_padding_of_is_trained(ranks: RankPools, tmp_path: Path) -> None:
    for found in ranks(2).run(scaled, str(tmp_path)):
        expected, _ = found[0]
        assert abs(expected["scale"].item() - 1.0) > 0.02
        for stage, (weights, alike) in found.items():
            assert alike, stage
            for name, weight in weights.items():
                torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6, msg=f"{name}, stage {stage}")
