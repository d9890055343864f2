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
from leap_dist.models.blocks import find_blocks

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Logits (tokens, experts); scores and indices (tokens, top_k)."""


def route_among_kept(model: nn.Module, family: FamilyConfig | None = None) -> list[RemovableHandle]:
    """Hook every router of the model; the handles' `remove` undoes it. Without a zero row, outputs stay bit for bit."""
    blocks = [block for block in find_blocks(model, family) if block.structure.kind == "expert"]
    routers = [model.get_submodule(block.path(block.table.router)) for block in blocks]  # type: ignore[union-attr]
    return [router.register_forward_hook(_reroute) for router in routers]


def _reroute(router: nn.Module, inputs: tuple[Any, ...], output: Routed) -> Routed:
    """The router's output with the experts left. If none is left all keep their logits: their weights are zero."""
    logits, scores, _ = output
    assert isinstance(router.weight, torch.Tensor)
    gone = (router.weight == 0).all(1)
    logits = logits.masked_fill(gone & ~gone.all(), float("-inf"))
    values, indices = torch.topk(logits.float().softmax(-1), int(router.top_k), dim=-1)  # type: ignore[arg-type]
    if getattr(router, "norm_topk_prob", True):
        values = values / values.sum(-1, keepdim=True)
    return logits, values.to(scores.dtype), indices
