"""The order of training data, so that a resumed run continues where it was.

Of data that are all there it is a pure function of seed, step and rank; of a stream the checkpoint says where it is.
"""

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


def micro_batches(deepspeed: Mapping[str, Any], world_size: int) -> int:
    """Of an optimizer step on a rank: as given, or as many as train_batch_size has room for."""
    filled = deepspeed.get("train_batch_size", 1) // (deepspeed["train_micro_batch_size_per_gpu"] * world_size)
    found: int = deepspeed.get("gradient_accumulation_steps", max(1, filled))
    return found


def accumulation(deepspeed: Mapping[str, Any], world_size: int) -> int:
    """Micro-batches in an optimizer step, as DeepSpeed takes them: as given, or what fills train_batch_size."""
    for key in ("gradient_accumulation_steps", "train_batch_size"):
        value = deepspeed.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{key}: got {value!r}; allowed: an integer >= 1")
    together = deepspeed["train_micro_batch_size_per_gpu"] * world_size
    batch, steps = deepspeed.get("train_batch_size"), micro_batches(deepspeed, world_size)
    if batch not in (None, together * steps):
        raise UserError(
            f"train_batch_size: got {batch}; allowed: {together * steps}, as {world_size} ranks with "
            f"train_micro_batch_size_per_gpu {together // world_size} take {together} examples at once, "
            f"gradient_accumulation_steps {steps} times; or leave it out"
        )
    return steps


def examples_per_step(deepspeed: Mapping[str, Any], world_size: int) -> int:
    """Examples of an optimizer step over all ranks."""
    micro: int = deepspeed["train_micro_batch_size_per_gpu"]
    return micro * accumulation(deepspeed, world_size) * world_size


def as_many_on_each(num: int, ranks: Ranks) -> int:
    """The smallest number that is at least `num` and gives all ranks as many."""
    return -(-num // ranks.world_size) * ranks.world_size


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

    state: dict[str, Any] | None = None
    """What a checkpoint has to hold of it: nothing, for the step says all."""

    def resume(self, state: Mapping[str, Any] | None) -> None:
        """Continue where a checkpoint was written."""

    def step(self, step: int) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of an optimizer step, on its device."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, bucketed(self._lengths, self._per_step, self._seed, epoch)
        batches = []
        for number in range(self._accumulation):
            position = (within * self._accumulation + number) * self._ranks.world_size + self._ranks.rank
            rows = self._order[position * self._micro_batch : (position + 1) * self._micro_batch].tolist()
            place = step, position * self._micro_batch % self._per_step
            batches.append(
                batch_of(self._task, [self._task.train[row] for row in rows], self._seed, place, self._ranks)
            )
        return batches

    @property
    def mean_length(self) -> float:
        """Tokens of a training example."""
        return float(self._lengths.mean())

    def examples(self, num: int) -> list[Example]:
        """Some training examples, `num` at most, the same on every rank."""
        return [self._task.train[row] for row in permutation(len(self._task.train), self._seed, 0)[:num]]

    def calibration(self, num: int) -> Iterator[dict[str, Tensor]]:
        """This rank's part of the first `num` micro-batches of the first epoch over all ranks, or of a few more, so
        that each rank has as many."""
        order = bucketed(self._lengths, self._per_step, self._seed, epoch=0)
        num = as_many_on_each(num, self._ranks)
        for number in range(self._ranks.rank, min(num, len(order) // self._micro_batch), self._ranks.world_size):
            rows = order[number * self._micro_batch : (number + 1) * self._micro_batch].tolist()
            place = 0, number * self._micro_batch
            yield batch_of(self._task, [self._task.train[row] for row in rows], self._seed, place, self._ranks)


class StreamBatches:
    """Micro-batches of a stream. The first rank reads it, once for all ranks; so a step's examples do not depend on how
    many there are. A mistake in it is raised on every rank.
    """

    steps_per_epoch = 0  # not known

    def __init__(
        self, task: Task, micro_batch: int, accumulation: int, seed: int, ranks: Ranks, total: int | None
    ) -> None:
        """total: optimizer steps of the run, for messages."""
        assert task.stream is not None
        self._task, self._stream, self._ranks, self._seed = task, task.stream, ranks, seed
        self._micro_batch, self._accumulation, self._total = micro_batch, accumulation, total
        self._num_ids: int | None = None  # rows of the model's embedding
        self._stream.begin(seed)

    def check(self, num_ids: int) -> None:
        """Take the first step's examples and put them back: a mistake in them ends a job of which nothing is written.

        num_ids: rows that the model has for tokens. Collective.
        """
        self._num_ids = num_ids
        self.step(0)
        self._stream.begin(self._seed)

    @property
    def state(self) -> dict[str, Any] | None:
        """What a checkpoint has to hold of it; the first rank's."""
        return self._stream.state

    def resume(self, state: Mapping[str, Any] | None) -> None:
        """Continue where a checkpoint was written."""
        if state is not None:
            self._stream.resume(state)

    def step(self, step: int) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of an optimizer step, on its device. Collective."""
        ranks, micro = self._ranks, self._micro_batch
        examples = self._take(self._accumulation * ranks.world_size * micro, self._called(step))
        starts = [(number * ranks.world_size + ranks.rank) * micro for number in range(self._accumulation)]
        return [
            batch_of(self._task, examples[start : start + micro], self._seed, (step, start), ranks) for start in starts
        ]

    @property
    def mean_length(self) -> float:
        """Tokens of a training example, of the first step's. Collective."""
        examples = self._take(self._accumulation * self._ranks.world_size * self._micro_batch, self._called(0))
        self._stream.begin(self._seed)
        return float(lengths_of(examples).mean())

    def examples(self, num: int) -> list[Example]:
        """The first `num` training examples, the same on every rank; the steps begin with them, too. Collective."""
        examples = self._take(num, "the calibration before the first step")
        self._stream.begin(self._seed)
        return examples

    def calibration(self, num: int) -> Iterator[dict[str, Tensor]]:
        """This rank's part of the first `num` micro-batches over all ranks, or of a few more, so that each rank has as
        many; the steps begin with them, too."""
        num = as_many_on_each(num, self._ranks)
        examples = self.examples(num * self._micro_batch)
        for number in range(self._ranks.rank, num, self._ranks.world_size):
            part = examples[number * self._micro_batch : (number + 1) * self._micro_batch]
            yield batch_of(self._task, part, self._seed, (0, number * self._micro_batch), self._ranks)

    def _called(self, step: int) -> str:
        return f"step {step + 1} of {self._total}"

    def _take(self, count: int, purpose: str) -> list[Example]:
        return self._ranks.on_first(lambda: self._checked(self._stream.take(count, purpose)))

    def _checked(self, examples: list[Example]) -> list[Example]:
        """What is known of other data before the model is loaded: that it has a row for every token."""
        highest = max(max(example["input_ids"]) for example in examples)
        if self._num_ids is not None and highest >= self._num_ids:
            raise UserError(
                f"data.train: {self._stream.source}: token id {highest}, and the model has {self._num_ids} rows for "
                "tokens; allowed: the tokenizer that came with the model"
            )
        return examples


def batch_of(
    task: Task, examples: Sequence[Example], seed: int, place: tuple[int, int], ranks: Ranks
) -> dict[str, Tensor]:
    """The collated examples on the rank's device. `place`: the step, and the first example's number in it, which decide
    all chance: it does not depend on how a step is cut into micro-batches and ranks.
    """
    batch = task.collate(examples)
    if task.augment is not None:
        step, first = place
        batch = task.augment(batch, [_chance(seed, step, first + row) for row in range(len(examples))])
    return {key: value.to(ranks.device) for key, value in batch.items()}


def _chance(*place: int) -> torch.Generator:
    state = np.random.SeedSequence(place).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


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
