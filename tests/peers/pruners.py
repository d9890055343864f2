"""Two published ways to prune while training, in plain torch on one process, as peers of LEAP on the same data.

Both prune single weights of the matrices that they are given, and end at the exact target: when `settle` is called the
best weights of all matrices together stay, by the method's own scores, and their masks are fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Threshold(torch.autograd.Function):
    """M = sigmoid(S) > tau; backward: dL/dS = dL/dM (Sanh et al., arXiv 2005.07683, soft movement)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, tau: float) -> Tensor:
        """The mask as numbers."""
        return (torch.sigmoid(scores) > tau).to(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The straight-through estimator."""
        return grads[0], None


class Pruner:
    """What the two share: the matrices, the fixed masks of the end, weights that are AdamW's."""

    def __init__(self, model: nn.Module, names: Iterable[str], lr: float, weight_decay: float) -> None:
        self.model = model
        self.weights = {name: model.get_parameter(name) for name in names}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
        self.fixed: dict[str, Tensor] | None = None

    def density(self) -> float:
        """Weights that are not zero / all."""
        total = sum(weight.numel() for weight in self.weights.values())
        return sum(int(torch.count_nonzero(weight)) for weight in self.weights.values()) / total

    @torch.no_grad()
    def fix_best(self, scores: dict[str, Tensor], target: float) -> None:
        """Keep the best `target` of all weights by score, ties to the first, and zero the others for good."""
        flat = torch.cat([scores[name].flatten() for name in self.weights])
        keep = best_of(flat, round(target * len(flat)))
        parts = keep.split([weight.numel() for weight in self.weights.values()])
        masks = zip(self.weights.items(), parts, strict=True)
        self.fixed = {name: part.view_as(weight) for (name, weight), part in masks}
        self._zero_pruned(self.fixed)

    @torch.no_grad()
    def _zero_pruned(self, masks: dict[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.mul_(masks[name])


def best_of(scores: Tensor, num: int) -> Tensor:
    """Which `num` of these scores, flat and finite, are the largest, ties to the first: bool. Without a sort of all."""
    if num == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    cut = torch.kthvalue(scores, len(scores) - num + 1).values
    keep = scores > cut
    keep[torch.nonzero(scores == cut).flatten()[: num - int(keep.sum())]] = True
    return keep


class SoftMovement(Pruner):
    """Scores S move by dL/dM and by the pull of their sigmoid's mean; weights with sigmoid(S) <= 0.1 are masked.

    pull: the weight of that mean at the end, which sets the density by trial; published: up to 400.
    """

    TAU = 0.1

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        lr: float,
        weight_decay: float,
        pull: float,
        score_rate: float = 1e-2,
    ) -> None:
        super().__init__(model, names, lr, weight_decay)
        self.pull, self.score_rate = pull, score_rate
        self.scores = {name: nn.Parameter(torch.zeros_like(weight)) for name, weight in self.weights.items()}
        self.score_optimizer = torch.optim.AdamW(self.scores.values(), lr=score_rate, weight_decay=0.0)

    def step(self, loss: Callable[[Callable[..., Any]], Tensor], level: float, target: float, scale: float) -> Tensor:
        """level, target: of the schedule, by which threshold and pull grow; scale: of the learning rates."""
        part = (1.0 - level) / (1.0 - target)
        for group, rate in ((self.optimizer, self.optimizer.defaults["lr"]), (self.score_optimizer, self.score_rate)):
            group.param_groups[0]["lr"] = rate * scale
            group.zero_grad()
        if self.fixed is not None:
            value = loss(self.model)
        else:
            masks = {name: Threshold.apply(scores, part * self.TAU) for name, scores in self.scores.items()}
            hosted = {name: weight * masks[name] for name, weight in self.weights.items()}
            value = loss(lambda *args, **kwargs: functional_call(self.model, hosted, args, kwargs))
            mean = torch.cat([torch.sigmoid(scores).flatten() for scores in self.scores.values()]).mean()
            value = value + part * self.pull * mean
        value.backward()
        self.optimizer.step()
        if self.fixed is None:
            self.score_optimizer.step()
        else:
            self._zero_pruned(self.fixed)
        return value.detach()

    def density(self) -> float:
        """Of the masks by the threshold, before the cut to the target."""
        if self.fixed is not None:
            return super().density()
        scores = torch.cat([scores.flatten() for scores in self.scores.values()])
        return (torch.sigmoid(scores) > self.TAU).float().mean().item()

    def settle(self, target: float) -> None:
        """Fix the best weights by S."""
        self.fix_best({name: scores.detach() for name, scores in self.scores.items()}, target)


class Platon(Pruner):
    """Sensitivity |W dL/dW| smoothed, times its uncertainty smoothed (Zhang et al., arXiv 2206.12562)."""

    BETA1, BETA2 = 0.85, 0.95

    def __init__(self, model: nn.Module, names: Iterable[str], lr: float, weight_decay: float) -> None:
        super().__init__(model, names, lr, weight_decay)
        self.sensitivity = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.uncertainty = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}

    def step(self, loss: Callable[[Callable[..., Any]], Tensor], level: float, target: float, scale: float) -> Tensor:
        """level: the part of the weights that is kept after the step; scale: of the learning rate."""
        self.optimizer.param_groups[0]["lr"] = self.optimizer.defaults["lr"] * scale
        self.optimizer.zero_grad()
        value = loss(self.model)
        value.backward()
        self._observe()
        self.optimizer.step()
        if self.fixed is not None:
            self._zero_pruned(self.fixed)
        elif level < 1.0:
            self.fix_best(self.scores(), level)
            self.fixed = None  # pruned weights get gradients, and may come back
        return value.detach()

    @torch.no_grad()
    def _observe(self) -> None:
        for name, weight in self.weights.items():
            assert weight.grad is not None
            seen, mean = (weight * weight.grad).abs(), self.sensitivity[name]
            mean.lerp_(seen, 1 - self.BETA1)
            self.uncertainty[name].lerp_((seen - mean).abs(), 1 - self.BETA2)

    def scores(self) -> dict[str, Tensor]:
        """Of all weights."""
        return {name: self.sensitivity[name] * self.uncertainty[name] for name in self.weights}

    def settle(self, target: float) -> None:
        """Fix the best weights by score."""
        self.fix_best(self.scores(), target)
