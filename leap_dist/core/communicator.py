"""Sums over the ranks that share a model; one class for one rank and for many."""

from typing import TypeVar

import torch.distributed
from torch import Tensor

from leap_dist.core.stopwatch import Stopwatch

T = TypeVar("T")


class Communicator:
    """In-place sums over a process group; at one rank nothing is communicated.

    `device` is where the group's backend wants its tensors (NCCL: the GPU); others are staged through it. Counted are
    the collectives and the bytes that this rank handed to them; `stopwatch` takes their time.
    """

    def __init__(self, group: torch.distributed.ProcessGroup | None = None, device: torch.device | None = None) -> None:
        self._group = group
        self._device = device
        self.num_collectives = 0
        self.num_bytes = 0
        self.stopwatch = Stopwatch()

    @property
    def rank(self) -> int:
        """This rank's place among those that share the model."""
        return 0 if self._group is None else torch.distributed.get_rank(self._group)

    @property
    def world_size(self) -> int:
        """How many ranks share the model."""
        return 1 if self._group is None else torch.distributed.get_world_size(self._group)

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in rank order; for tables made once, not for the step."""
        if self._group is None:
            return [value]
        gathered = [value] * self.world_size
        torch.distributed.all_gather_object(gathered, value, group=self._group)
        return gathered

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over all ranks, the same bits on every rank; returns it."""
        if self._group is None or tensor.numel() == 0:
            return tensor
        self.num_collectives += 1
        self.num_bytes += tensor.numel() * tensor.element_size()
        with self.stopwatch.measure("communication"):
            if self._device is None or tensor.device == self._device:
                torch.distributed.all_reduce(tensor, group=self._group)
                return tensor
            staged = tensor.to(self._device)
            torch.distributed.all_reduce(staged, group=self._group)
            return tensor.copy_(staged)

    def union(self, flags: Tensor) -> Tensor:
        """The flags of all ranks together, bool of shape (n,), a new tensor; one rank at most sets a flag.

        Sent as bits: every flag stands in a bit of its own, so that the sum of the bytes carries nothing over.
        """
        if self._group is None:
            return flags.clone()
        places = torch.arange(8, dtype=torch.uint8, device=flags.device)
        padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, -len(flags) % 8)).view(-1, 8)
        packed = self.sum_((padded << places).sum(1, dtype=torch.uint8))
        return (packed[:, None] >> places & 1).bool().flatten()[: len(flags)]
