"""Mask flips: how many weights changed sides since the last look, from a copy of one bit a weight."""

from collections.abc import Iterable

import torch
from torch import Tensor

CHUNK = 1 << 24  # weights packed at a time: bounds what packing needs besides the copy
GATHER = 0x0102040810204080  # a product with it has the lowest bits of eight bytes in its highest byte


class Flips:
    """Counts what changed in masks from call to call; it costs nothing in between."""

    def __init__(self) -> None:
        self._last: list[Tensor] | None = None

    def count(self, masks: Iterable[Tensor]) -> int:
        """Entries of flat bool masks that differ from the last call's; before the first call nothing was pruned.

        The masks of a call have the lengths and the order of those before.
        """
        packed = [pack(~part) for mask in masks for part in mask.split(CHUNK)]
        last = self._last or [torch.zeros_like(part) for part in packed]
        self._last = packed
        return sum(num_bits(now ^ before) for now, before in zip(packed, last, strict=True))


def pack(mask: Tensor) -> Tensor:
    """A flat bool mask, eight entries a byte; bits beyond its end are 0. uint8 of shape (ceil(n / 8),)."""
    bytes_ = torch.zeros(-(-len(mask) // 8) * 8, dtype=torch.uint8, device=mask.device)
    bytes_[: len(mask)] = mask
    return ((bytes_.view(torch.int64) * GATHER >> 56) & 0xFF).to(torch.uint8)


def num_bits(packed: Tensor) -> int:
    """Ones among the bits of uint8."""
    pairs = packed - ((packed >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return int(((fours + (fours >> 4)) & 0x0F).sum(dtype=torch.int64).item())
