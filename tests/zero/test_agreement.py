"""Ranks that are configured differently, or end differently, are told so before anything is built or certified."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from leap_dist.errors import UserError
from leap_dist.zero.agreement import first_difference
from tests.peers.nets import LR, net
from tests.ranks import RankPools


def config(stage: int, **leap: Any) -> dict[str, Any]:
    section = {"target": 0.2, "total_steps": 20, **leap}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "leap": section,
        "zero_allow_untested_optimizer": True,
    }


def said(action: Any, error: type[Exception] = UserError) -> str:
    """What an action is refused with on this rank."""
    try:
        action()
    except error as refused:
        return str(refused)
    return ""


def differing(stage: int) -> list[str]:
    """What initialize and host say where the second rank has another length, rate, model or mistake."""
    import leap_dist

    second = torch.distributed.get_rank() == 1
    found = []
    for ours, rate, kind in (
        (config(stage, total_steps=21 if second else 22), LR, "element"),
        (config(stage) | ({"gradient_clipping": 0.5} if second else {"gradient_clipping": 1.0}), LR, "element"),
        (config(stage), 2 * LR if second else LR, "element"),
        (config(stage), LR, "head+neuron" if second else "element"),
        (config(stage, target=2 if second else 0.2), LR, "element"),
        (config(stage, target=2), LR, "element"),
    ):
        model = net(kind)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        names = [name for name, _ in model.named_parameters()]
        found.append(said(lambda: leap_dist.initialize(model=model, config=ours, optimizer=optimizer)))  # noqa: B023
        hosted = said(lambda: leap_dist.host(model, optimizer, ours))  # noqa: B023
        assert hosted == found[-1]
        assert [name for name, _ in model.named_parameters()] == names
    return found


def test_ranks_that_are_configured_differently_are_refused_with_the_key_and_both_values(ranks: RankPools) -> None:
    first, second = ranks(2).run(differing, 2)
    assert first == second
    assert first[0] == (
        "the ranks are configured differently: leap.total_steps: rank 0 has 22, rank 1 has 21; give every rank the same"
    )
    assert "gradient_clipping: rank 0 has 1.0, rank 1 has 0.5; give" in first[1]
    assert f"param_groups[0].lr: rank 0 has {LR}, rank 1 has {2 * LR}; " in first[2]
    assert "gates.1.weight:element: rank 0 has " in first[3] and "rank 1 has nothing; " in first[3]
    assert first[4].startswith("rank 1: leap: 1 problem\n  leap.target: got 2;")
    assert first[5].startswith("leap: 1 problem\n  leap.target: got 2;")


def told_at_the_end(stage: int) -> list[str]:
    """What attach says of groups that were changed on one rank, and finalize of weights."""
    import leap_dist

    second = torch.distributed.get_rank() == 1
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    settings = config(stage, score_init="magnitude")  # there is no step, which gradients would come from
    engine, *_ = leap_dist.initialize(model=model, config=settings, optimizer=optimizer)
    group = engine.leap.param_groups[0]
    group["eps"] = 1e-6 if second else 1e-8
    found = [said(lambda: leap_dist.attach(engine))]
    group["eps"] = 1e-8
    clipping, engine.gradient_clipping = engine.gradient_clipping, lambda: 0.5 if second else 1.0
    found.append(said(lambda: leap_dist.attach(engine)))
    engine.gradient_clipping = clipping
    if second:
        with torch.no_grad():
            model.get_parameter("0.bias").add_(1.0)
    found.append(said(lambda: leap_dist.finalize(engine), RuntimeError))
    return found


def test_an_engine_is_compared_when_it_is_attached_and_when_it_is_finished(ranks: RankPools) -> None:
    first, second = ranks(2).run(told_at_the_end, 0)
    assert first == second
    assert "param_groups[0].eps: rank 0 has 1e-08, rank 1 has 1e-06; give every rank the same" in first[0]
    assert "gradient_clipping: rank 0 has 1.0, rank 1 has 0.5; give every rank the same" in first[1]
    assert first[2].startswith("the ranks do not hold the same model: weights_sha256: rank 0 has ")


def test_the_first_key_that_differs_is_named() -> None:
    assert first_difference([{"a": "1", "b": "2"}, {"a": "1", "b": "2"}, {"a": "1", "c": "3"}]) == (
        "b: rank 0 has 2, rank 2 has nothing; 1 more differ"
    )


def skipping(stage: int) -> dict[str, Any]:
    """A loop of one's own of 20 steps, three of which have a loss that is not finite on the last rank."""
    import leap_dist
    from tests.peers.nets import GLOBAL_BATCH, batches, loss_of

    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    size = GLOBAL_BATCH // ranks
    ours = config(stage) | {"train_micro_batch_size_per_gpu": size}
    model = net()
    engine, *_ = leap_dist.initialize(
        model=model,
        config=ours,
        optimizer=torch.optim.AdamW(model.parameters(), lr=LR),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / 20),
    )
    phases = []
    for step, (x, y) in enumerate(batches(20)):
        loss = loss_of(engine(x[rank * size :][:size]), y[rank * size :][:size])
        engine.backward(loss * float("inf") if step in (0, 5, 16) and rank == ranks - 1 else loss)
        engine.step()
        phases.append((engine.leap.num_steps, engine.leap.phase))
    certificate = leap_dist.finalize(engine)
    rate = engine.leap.param_groups[0]["lr"] / LR
    return {"phases": phases, "kept": certificate["kept"], "prunable": certificate["prunable"], "rate": rate}


@pytest.mark.parametrize(("stage", "world"), [(0, 2), (1, 1), (2, 2), (3, 1)])
def test_steps_that_are_skipped_advance_the_schedule_in_a_loop_of_ones_own(
    ranks: RankPools, stage: int, world: int
) -> None:
    found = ranks(world).run(skipping, stage)
    assert all(other == found[0] for other in found)
    expected = ["dense"] * 0 + ["prune"] * 15 + ["settle"] * 5
    assert found[0]["phases"] == [(step + 1, phase) for step, phase in enumerate(expected)]
    assert abs(found[0]["kept"] - 0.2 * found[0]["prunable"]) <= 1
    assert found[0]["rate"] == pytest.approx(1.0 - 17 / 20)  # DeepSpeed's scheduler does not move, at any stage
