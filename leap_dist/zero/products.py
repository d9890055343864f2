"""Products: what the matrices of fused experts are multiplied with, seen while their module computes.

One module of transformers holds the matrices of all experts of a block. It chooses the tokens of every expert and
multiplies them, expert by expert or in one grouped product. So no module is called with what a matrix is given, but
the product's operands tell: the second is a part of the tensor, the first are its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from leap_dist.core.inputs import Inputs

PRODUCTS = {"linear", "matmul", "__matmul__", "mm", "bmm", "grouped_mm", "_grouped_mm", "grouped_mm_fallback"}
CHUNK = 8192  # rows in fp64 at a time
CHOICES = {"__getitem__", "index_select", "repeat_interleave"}


def sums_of_groups(x: Tensor, ends: Tensor) -> Tensor:
    """Sums of squares of groups of rows, fp64 (groups, features), without waiting for the device.

    x: (rows, features). ends: (groups,), the row after the last of each; rows after all of them are in no group.
    """
    groups = torch.searchsorted(ends, torch.arange(len(x), device=x.device, dtype=ends.dtype), right=True)
    sums = x.new_zeros(len(ends) + 1, x.shape[-1], dtype=torch.float64)
    for rows, group in zip(x.split(CHUNK), groups.split(CHUNK), strict=True):
        sums.index_add_(0, group, rows.float().square().double())
    return sums[:-1]


class Products(TorchFunctionMode):
    """Reports to `inputs` what `weights` are multiplied with, from entering to leaving it.

    weights: (experts, ...) by name, as wholly as the module sees them. tokens: what the module is given, (..., width);
    kept: which of them are no padding, of their shape without the width, None for all.
    """

    def __init__(self, inputs: Inputs, weights: Mapping[str, Tensor], tokens: Tensor, kept: Tensor | None) -> None:
        super().__init__()
        self._inputs, self._weights, self._tokens, self._kept = inputs, weights, tokens, kept
        self._chosen: Tensor | None = None  # which rows of the tokens last chosen are no padding

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in CHOICES and self._kept is not None and args and self._are_tokens(args[0]):
            self._chosen = func(self._kept.view(args[0].shape[:-1]), *args[1:], **kwargs)
        elif name in PRODUCTS:
            self._see([value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)])
        return func(*args, **kwargs)

    def _are_tokens(self, x: Any) -> bool:
        """Whether these are the module's tokens, also in another shape."""
        own = self._tokens
        return isinstance(x, Tensor) and x.data_ptr() == own.data_ptr() and x.numel() == own.numel()

    @torch.compiler.disable
    def _see(self, operands: list[Tensor]) -> None:
        """Count the inputs of one product: rows, weights, and where the rows of each expert end if they are many."""
        if len(operands) < 2 or (found := self._find(operands[1])) is None:
            return
        name, expert = found
        x, weight = operands[0].detach(), self._weights[name]
        if self._chosen is not None and x.shape[:-1] == self._chosen.shape:
            x = torch.where(self._chosen[:, None], x, 0.0)
        if operands[1].numel() < weight.numel() or len(weight) == 1:
            self._inputs.see(name, x, expert * self._inputs.axes[name].inputs_each)
        elif x.dim() == 3:  # as many rows for every expert
            self._inputs.see(name, x.transpose(0, 1).flatten(1))
        else:
            self._inputs.add(name, sums_of_groups(x, operands[2]).flatten())

    def _find(self, operand: Tensor) -> tuple[str, int] | None:
        """The tensor that an operand is, or is a part of, and the expert with which it begins."""
        for name, weight in self._weights.items():
            offset = operand.data_ptr() - weight.data_ptr()
            if 0 <= offset < weight.numel() * weight.element_size() and operand.device == weight.device:
                return name, offset // (weight[0].numel() * weight.element_size())
        return None
