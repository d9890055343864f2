"""Evaluation on all ranks, every example counted once."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from leap_dist.tasks.base import Example, Task
from leap_dist.zero.ranks import Ranks


@torch.no_grad()
def evaluate(engine: Any, task: Task, batch_size: int, ranks: Ranks) -> dict[str, float]:
    """The task's metrics and the mean loss on every validation split; the first split's names have no prefix.

    Rank r takes examples r, r + world, ...; where the last ranks have one example less they run another again,
    so that all make the same forward passes (ZeRO-3 gathers in step), and its result is dropped. Collective.
    """
    engine.eval()
    results: dict[str, float] = {}
    for number, (split, examples) in enumerate(task.validation.items()):
        prefix = "" if number == 0 else f"{split}_"
        predictions, labels, losses = _run_split(engine, task, examples, batch_size, ranks)
        metrics = task.metrics()
        metrics.update(predictions, labels)
        results |= {f"{prefix}{name}": float(value) for name, value in metrics.compute().items()}
        results[f"{prefix}loss"] = losses.mean().item()
    engine.train()
    return results


def _run_split(
    engine: Any, task: Task, examples: Sequence[Example], batch_size: int, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """(predictions, labels, losses) of all examples in their order, on every rank."""
    parts = [_run_batch(engine, task, batch, ranks) for batch in _rank_batches(examples, batch_size, ranks)]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    merged = [torch.stack(ranks.gather(column), dim=1).flatten()[: len(examples)] for column in columns]
    predictions, labels, losses = merged
    return predictions, labels, losses


def _rank_batches(examples: Sequence[Example], batch_size: int, ranks: Ranks) -> Iterator[list[Example]]:
    """This rank's examples, equally many on every rank."""
    num_each = -(-len(examples) // ranks.world_size)
    mine = [min(i * ranks.world_size + ranks.rank, len(examples) - 1) for i in range(num_each)]
    for start in range(0, num_each, batch_size):
        yield [examples[i] for i in mine[start : start + batch_size]]


def _run_batch(engine: Any, task: Task, batch: list[Example], ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """(predictions, labels, losses), each (batch,)."""
    inputs = {key: value.to(ranks.device) for key, value in task.collate(batch).items()}
    labels = inputs.pop("labels")
    logits = engine(**inputs).logits.float()
    if task.problem == "regression":
        predictions = logits.squeeze(-1)
        return predictions, labels, (predictions - labels) ** 2
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return logits.argmax(-1), labels, losses
