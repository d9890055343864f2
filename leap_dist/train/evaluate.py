"""Evaluation on all ranks, every example counted once."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leap_dist.tasks.base import Example, Task, lengths_of
from leap_dist.train.progress import Progress
from leap_dist.zero.ranks import Ranks


@torch.no_grad()
def evaluate(
    engine: Any, task: Task, batch_size: int, ranks: Ranks, heed: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """The task's metrics and the mean loss on every validation split; the first split's names have no prefix.

    Examples go through in the order of their lengths. Rank r takes the r-th of every `world_size` of them; where the
    last ranks have one less they run another again, so that all make the same forward passes (ZeRO-3 gathers in
    step), and its result is dropped. `heed` is called after each batch, on all ranks. Collective.
    """
    engine.eval()
    results: dict[str, float] = {}
    orders = {split: np.argsort(lengths_of(examples), kind="stable") for split, examples in task.validation.items()}
    rows = {split: list(_rank_rows(order, batch_size, ranks)) for split, order in orders.items()}
    with Progress(sum(map(len, rows.values())), ranks.first, aside=True) as progress:
        done = count(1)
        for number, (split, examples) in enumerate(task.validation.items()):
            parts = []
            for batch in rows[split]:
                parts.append(_predicted(engine, task, [examples[row] for row in batch], ranks))
                progress.update(next(done), "evaluate", {})
                heed()
            back = torch.from_numpy(np.argsort(orders[split], kind="stable"))
            kept = {key: _merged([part[key] for part in parts], ranks)[back] for key in parts[0]}
            prefix = "" if number == 0 else f"{split}_"
            results |= {f"{prefix}{name}": value for name, value in task.evaluation.score(split, kept).items()}
    engine.train()
    return results


def _predicted(engine: Any, task: Task, examples: Sequence[Example], ranks: Ranks) -> dict[str, Tensor]:
    """What the task keeps of a batch."""
    batch = {key: value.to(ranks.device) for key, value in task.collate(examples).items()}
    return task.evaluation.predict(engine, batch)


def _rank_rows(order: np.ndarray, batch_size: int, ranks: Ranks) -> Iterator[list[int]]:
    """The rows of this rank's batches, equally many on every rank."""
    num_each = -(-len(order) // ranks.world_size)
    places = np.minimum(np.arange(num_each) * ranks.world_size + ranks.rank, len(order) - 1)
    for start in range(0, num_each, batch_size):
        yield order[places[start : start + batch_size]].tolist()


def _merged(parts: list[Tensor], ranks: Ranks) -> Tensor:
    """The parts of all ranks, (num_each * world_size, ...), in the order that they were dealt out in."""
    return torch.stack(ranks.gather(torch.cat(parts)), dim=1).flatten(0, 1)
