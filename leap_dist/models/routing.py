"""Pruned experts are not routed to.

A router row of zeros gives the logit 0, which can win. A forward hook on every router makes such experts unreachable:
their logits are -inf, and softmax, top-k and normalisation are redone. What is gone is read from the hosted weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from leap_dist.config.family import FamilyConfig
from leap_dist.errors import UserError
from leap_dist.models.blocks import find_blocks

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Logits (tokens, experts); scores and indices (tokens, top_k)."""
TRIED = 32  # random states on which a router is looked at


def route_among_kept(
    model: nn.Module, family: FamilyConfig | None = None, to_prune: bool = False
) -> list[RemovableHandle]:
    """Hook every router of the model; the handles' `remove` undoes it. Without a zero row, outputs stay bit for bit.

    Raises UserError for a router that weighs experts in another way, if experts are gone or are `to_prune`.
    """
    routers = []
    for block in find_blocks(model, family):
        if block.structure.kind != "expert":
            continue
        name = block.path(block.table.router)  # type: ignore[union-attr]
        router = model.get_submodule(name)
        if _weighs_by_softmax(router):
            routers.append(router)
        elif to_prune or (router.weight == 0).all(1).any():  # type: ignore[union-attr]
            raise UserError(
                f"{name}: this router does not weigh the best experts by a softmax of their logits, so none can leave; "
                'remove "expert" from leap.gates'
            )
    return [router.register_forward_hook(_reroute) for router in routers]


def _reroute(router: nn.Module, inputs: tuple[Any, ...], output: Routed) -> Routed:
    """The router's output with the experts left. If none is left all keep their logits: their weights are zero."""
    logits, scores, _ = output
    assert isinstance(router.weight, torch.Tensor)
    gone = (router.weight == 0).all(1)
    logits = logits.masked_fill(gone & ~gone.all(), float("-inf"))
    values, indices = _best(router, logits)
    return logits, values.to(scores.dtype), indices


def _best(router: nn.Module, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and indices (tokens, top_k) of the experts with the highest logits."""
    values, indices = torch.topk(logits.float().softmax(-1), int(router.top_k), dim=-1)  # type: ignore[arg-type]
    if getattr(router, "norm_topk_prob", True):
        values = values / values.sum(-1, keepdim=True)
    return values, indices


def _weighs_by_softmax(router: nn.Module) -> bool:
    """Whether it chooses and weighs as `_best` does, on random states, with random weights: ZeRO may hold its own."""
    random = torch.Generator().manual_seed(0)
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in router.named_parameters()}
    weights = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    states = torch.randn(TRIED, shapes["weight"][1], generator=random)
    try:
        with torch.no_grad():
            logits, scores, indices = torch.func.functional_call(router, weights, (states,))
            expected = _best(router, logits)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # other arguments or results than a router's here
        return False
    given, wanted = (torch.zeros(logits.shape).scatter(1, i, s.float()) for s, i in ((scores, indices), expected))
    return torch.allclose(given, wanted, rtol=1e-3, atol=1e-5)
