"""The order of training data: a pure function of seed, step and rank, so that a resumed run continues where it was."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leap_dist.errors import UserError
from leap_dist.tasks.base import Example, Task, lengths_of
from leap_dist.zero.ranks import Ranks

POOL = 50
"""Steps whose examples are sorted by length together: enough for little padding, few enough to stay shuffled."""


def accumulation(deepspeed: Mapping[str, Any], world_size: int) -> int:
    """Micro-batches in an optimizer step, as DeepSpeed takes them: as given, or what fills train_batch_size."""
    for key in ("gradient_accumulation_steps", "train_batch_size"):
        value = deepspeed.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{key}: got {value!r}; allowed: an integer >= 1")
    filled = deepspeed.get("train_batch_size", 1) // (deepspeed["train_micro_batch_size_per_gpu"] * world_size)
    steps: int = deepspeed.get("gradient_accumulation_steps", max(1, filled))
    return steps


class Batches:
    """Micro-batches of a task's training examples; every epoch is a new permutation, its last part batch dropped.

    The examples of a step are of like length (`bucketed`), so that little of a batch is padding and no rank waits
    long for another.
    """

    def __init__(self, task: Task, micro_batch: int, accumulation: int, seed: int, ranks: Ranks) -> None:
        self._task, self._ranks, self._seed = task, ranks, seed
        self._micro_batch, self._accumulation = micro_batch, accumulation
        self._per_step = micro_batch * accumulation * ranks.world_size
        self._lengths = lengths_of(task.train)
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)
        self.steps_per_epoch = len(task.train) // self._per_step
        if self.steps_per_epoch == 0:
            raise UserError(
                f"data.train: {len(task.train)} examples do not fill one step of {self._per_step} "
                "(train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks); use smaller batches"
            )

    def step(self, step: int) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of an optimizer step, on its device."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, bucketed(self._lengths, self._per_step, self._seed, epoch)
        batches = []
        for number in range(self._accumulation):
            position = (within * self._accumulation + number) * self._ranks.world_size + self._ranks.rank
            rows = self._order[position * self._micro_batch : (position + 1) * self._micro_batch].tolist()
            batches.append(self._batch([self._task.train[row] for row in rows], (step, number, self._ranks.rank)))
        return batches

    def calibration(self, num: int) -> Iterator[dict[str, Tensor]]:
        """This rank's part of the first `num` micro-batches of the first epoch, counted over all ranks."""
        order = bucketed(self._lengths, self._per_step, self._seed, epoch=0)
        for number in range(self._ranks.rank, min(num, len(order) // self._micro_batch), self._ranks.world_size):
            rows = order[number * self._micro_batch : (number + 1) * self._micro_batch].tolist()
            yield self._batch([self._task.train[row] for row in rows], (0, number, 0))

    def _batch(self, examples: Sequence[Example], place: tuple[int, int, int]) -> dict[str, Tensor]:
        """The collated examples; `place` (step, micro-batch, rank) decides all chance in it."""
        batch = self._task.collate(examples)
        if self._task.augment is not None:
            state = np.random.SeedSequence([self._seed, *place]).generate_state(1, np.uint64)
            batch = self._task.augment(batch, torch.Generator().manual_seed(int(state[0]) >> 1))
        return {key: value.to(self._ranks.device) for key, value in batch.items()}


def bucketed(lengths: np.ndarray, per_step: int, seed: int, epoch: int) -> np.ndarray:
    """Rows of an epoch, (steps * per_step,): a permutation in which the rows of each step are of like length.

    Every POOL steps of the epoch's permutation are sorted by length and cut into steps, and these are shuffled.
    Rows that all have one length stay as the permutation has them.
    """
    order = np.array(permutation(len(lengths), seed, epoch))
    order = order[: len(order) // per_step * per_step]
    if len(order) == 0 or (lengths == lengths[0]).all():
        return order
    rng = np.random.default_rng([seed, epoch])
    pools = []
    for start in range(0, len(order), POOL * per_step):
        pool = order[start : start + POOL * per_step]
        steps = pool[np.argsort(lengths[pool], kind="stable")].reshape(-1, per_step)
        pools.append(rng.permutation(steps).ravel())
    return np.concatenate(pools)


def permutation(length: int, seed: int, epoch: int) -> list[int]:
    """The order of `length` training examples in an epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(length, generator=generator).tolist()
    return order
