"""Norms in a model of which some is pruned: what they compute where their weights are gone.

A LayerNorm whose weights and biases are all zero belongs to a layer that left: it passes what it is given, so that
the layer adds nothing where the norm follows the sum. Hooks read that from the hosted weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def is_layer_norm(module: nn.Module) -> bool:
    """Whether a module subtracts a mean: torch's, and DeBERTa's own."""
    return isinstance(module, nn.LayerNorm) or type(module).__name__ == "DebertaLayerNorm"


def norm_among_kept(model: nn.Module) -> list[RemovableHandle]:
    """Hook every LayerNorm; the handles' `remove` undoes it. Without a zero, outputs stay bit for bit."""
    norms = [module for module in model.modules() if is_layer_norm(module)]
    return [norm.register_forward_hook(_pass) for norm in norms if norm.weight is not None]


def _pass(norm: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """The norm's output; its input where no weight and no bias is left."""
    assert isinstance(norm.weight, Tensor)
    kept = norm.weight != 0
    if isinstance(norm.bias, Tensor):
        kept = kept | (norm.bias != 0)
    return torch.where(kept.any(), output, inputs[0].to(output.dtype))
