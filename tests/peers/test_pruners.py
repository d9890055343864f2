"""The peers are what their papers say, on numbers made by hand, and end at the exact target."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from leap_dist.core.oracle import top_k
from tests.peers.nets import batches, loss_of, net
from tests.peers.pruners import Platon, Pruner, SoftMovement, Threshold, best_of


def names_of(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.dim() == 2]


@pytest.mark.parametrize("kind", ["soft movement", "platon"])
def test_a_run_ends_at_the_exact_target_and_learns(kind: str) -> None:
    model = net()
    known = model, names_of(model), 3e-3, 0.0
    pruner: SoftMovement | Platon = SoftMovement(*known, 1.0) if kind == "soft movement" else Platon(*known)
    losses: list[Tensor] = []
    for step, (x, y) in enumerate(batches(60)):
        if step == 45:
            pruner.settle(0.3)
        level = max(0.3, 1.0 - step / 40)
        losses.append(pruner.step(lambda forward, x=x, y=y: loss_of(forward(x), y), level, 0.3, 1.0))  # type: ignore[misc]
    total = sum(weight.numel() for weight in pruner.weights.values())
    assert pruner.density() == pytest.approx(0.3, abs=1 / total)
    assert torch.stack(losses[-5:]).mean() < torch.stack(losses[:5]).mean()


def test_sensitivity_times_uncertainty() -> None:
    model = nn.Linear(1, 2, bias=False)
    pruner = Platon(model, ["weight"], 0.0, 0.0)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0], [-1.0]]))
    for _ in range(2):  # W dL/dW is 2 and 1 in both steps
        pruner.step(lambda forward: forward(torch.ones(1, 1)).sum(), 1.0, 0.5, 1.0)
    smooth = torch.tensor([2.0, 1.0]) * (1 - 0.85**2)
    first = 0.05 * torch.tensor([2.0, 1.0]) * 0.85
    unsure = 0.95 * first + 0.05 * torch.tensor([2.0, 1.0]) * 0.85**2
    torch.testing.assert_close(pruner.scores()["weight"].flatten(), smooth * unsure)


def test_scores_of_soft_movement_get_the_gradient_of_their_masks() -> None:
    scores = torch.tensor([3.0, -3.0], requires_grad=True)
    mask = Threshold.apply(scores, 0.1)
    assert mask.tolist() == [1.0, 0.0]
    (mask * torch.tensor([5.0, 7.0])).sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == [5.0, 7.0]


def test_ties_go_to_the_first() -> None:
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    Pruner(model, ["weight"], 0.0, 0.0).fix_best({"weight": torch.ones(1, 4)}, 0.5)
    assert model.weight.tolist() == [[1.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("num", [0, 1, 7, 499, 500])
def test_the_best_are_those_of_a_stable_sort(num: int) -> None:
    torch.manual_seed(num)
    scores = torch.randint(9, (500,)).float()
    assert torch.equal(best_of(scores, num), top_k(scores, num))
