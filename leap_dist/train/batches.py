"""The order of training data: a pure function of seed, step and rank, so that a resumed run goes on where it was."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from leap_dist.errors import UserError
from leap_dist.tasks.base import Example, Task
from leap_dist.zero.ranks import Ranks


class Batches:
    """Micro-batches of a task's training examples; every epoch is a new permutation, its last part batch dropped."""

    def __init__(self, task: Task, micro_batch: int, accumulation: int, seed: int, ranks: Ranks) -> None:
        self._task, self._ranks, self._seed = task, ranks, seed
        self._micro_batch, self._accumulation = micro_batch, accumulation
        per_step = micro_batch * accumulation * ranks.world_size
        self.steps_per_epoch = len(task.train) // per_step
        if self.steps_per_epoch == 0:
            raise UserError(
                f"data.train: {len(task.train)} examples do not fill one step of {per_step} "
                "(train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks); use smaller batches"
            )

    def step(self, step: int) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of an optimizer step, on its device."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = permutation(len(self._task.train), self._seed, epoch)
        batches = []
        for number in range(self._accumulation):
            position = (within * self._accumulation + number) * self._ranks.world_size + self._ranks.rank
            rows = order[position * self._micro_batch : (position + 1) * self._micro_batch]
            batches.append(self._batch([self._task.train[row] for row in rows]))
        return batches

    def _batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return {key: value.to(self._ranks.device) for key, value in self._task.collate(examples).items()}


@lru_cache(maxsize=2)
def permutation(length: int, seed: int, epoch: int) -> list[int]:
    """The order of `length` training examples in an epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(length, generator=generator).tolist()
    return order
