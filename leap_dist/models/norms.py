"""Norms in a model of which some is pruned: what they compute where their weights are gone.

A LayerNorm takes mean and variance over the dimensions that it has a weight or a bias for: the others left the residual
stream, and are zero in it. One that has none belongs to a layer that left: it passes what it is given, so that the
layer adds nothing where the norm follows the sum. Hooks read that from the hosted weights.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def is_layer_norm(module: nn.Module) -> bool:
    """Whether a module subtracts a mean: torch's, and DeBERTa's own."""
    return isinstance(module, nn.LayerNorm) or type(module).__name__ == "DebertaLayerNorm"


def norm_among_kept(model: nn.Module, masked: Collection[str]) -> list[RemovableHandle]:
    """Hook every LayerNorm whose weight is among the tensors `masked`; the handles' `remove` undoes it.

    Without a zero, outputs stay bit for bit.
    """
    norms = {f"{path}.weight": module for path, module in model.named_modules() if is_layer_norm(module)}
    return [norm.register_forward_hook(_among_kept) for name, norm in norms.items() if name in masked]


def _among_kept(norm: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """The norm over the dimensions left, (..., width): all by the module itself, none passes its input."""
    weight, bias, x = norm.weight, norm.bias, inputs[0]
    assert isinstance(weight, Tensor)
    kept = weight != 0
    if isinstance(bias, Tensor):
        kept = kept | (bias != 0)
    count, values = kept.sum(), x.float()
    centred = values - (values * kept).sum(-1, keepdim=True) / count.clamp(min=1)
    variance = (centred.square() * kept).sum(-1, keepdim=True) / count.clamp(min=1)
    epsilon = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon
    some = centred * torch.rsqrt(variance + epsilon) * weight
    some = some if bias is None else some + bias
    some = torch.where(count > 0, some, values).to(output.dtype)
    return torch.where(kept.all(), output, some)
