"""Fragments: the parts of tensors that a rank holds, and where they lie in its flat buffers.

ZeRO gives a rank a run of elements [start, start + length) of a tensor, kept in a flat fp32 buffer at `offset`.
Optimizer state has the buffer's shape, so the same offset finds a fragment's moments, scores and mask.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + length) of `tensor` (row-major), at `offset` of the flat buffer `flat`."""

    tensor: str
    start: int
    length: int
    flat: Tensor
    offset: int

    def view(self, flat: Tensor) -> Tensor:
        """This fragment's part, shape (length,), of a tensor that has the flat buffer's shape."""
        return flat.detach().view(-1)[self.offset : self.offset + self.length]

    def gradient(self) -> Tensor:
        """This fragment's part of the flat buffer's gradient, shape (length,)."""
        assert self.flat.grad is not None, "the flat buffer has no gradient now"
        return self.view(self.flat.grad)


def whole(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[Fragment]:
    """The fragments of one rank that holds every parameter in full, each its own buffer (ZeRO stage 0)."""
    return [Fragment(name, 0, p.numel(), p, 0) for name, p in named_parameters]
