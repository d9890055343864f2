"""The run's metrics, measured once more where an export computes with other numbers than the run: fewer bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from leap_dist.config.sections import DataConfig
from leap_dist.errors import UserError
from leap_dist.export.hf import load_exported_tokenizer
from leap_dist.export.latency import LONGEST, Runner, torch_runner

if TYPE_CHECKING:
    from leap_dist.export.shrunk import Models
    from leap_dist.tasks.base import Example, Task

FEWEST = 8
"""Examples that are judged however long they take."""


@dataclass(frozen=True)
class Judged:
    """Metrics of the shrunk model in fp32, and of the export, on the same examples of the main validation split."""

    examples: int
    of: int
    before: dict[str, float]
    after: dict[str, float]

    def note(self) -> str:
        """A line of the card."""
        pairs = [f"{name} {value:.4g} → {self.after[name]:.4g}" for name, value in self.before.items()]
        some = f"{self.examples:,} of {self.of:,}" if self.examples < self.of else f"all {self.of:,}"
        return f"On {some} validation examples, in fp32 → here: {', '.join(pairs)}."


def judge(models: Models, runner: Runner) -> Judged | str:
    """As many examples as take about LONGEST seconds, spread over the split; or why they are not measured."""
    task = _task_of(models)
    if isinstance(task, str):
        return task
    split, examples = next(iter(task.validation.items()))
    runners = {"before": torch_runner(models.shrunk), "after": runner}
    started = time.monotonic()
    for run in runners.values():
        _predict(task, run, examples[:2])
    each = (time.monotonic() - started) / 2
    number = min(max(int(LONGEST / max(each, 1e-6)), FEWEST), len(examples))
    if number < len(examples) and task.problem == "question_answering":
        return "questions are scored by all their windows, which would take too long"
    rows = np.linspace(0, len(examples) - 1, number).round().astype(int).tolist()
    chosen = [examples[row] for row in rows]
    models.say(f"measuring {task.primary} on {number:,} examples", 0.0)  # how many are chosen is not known before
    scores = {name: task.evaluation.score(split, _predict(task, run, chosen)) for name, run in runners.items()}
    return Judged(number, len(examples), **scores)


def _task_of(models: Models) -> Task | str:
    """The task of the run with its validation data, or why it is not there."""
    from leap_dist.tasks import load_task

    if models.run.plain:
        return "no run says by which task"
    try:
        data = DataConfig.model_validate(models.run.job["data"])
        classes = [name for _, name in sorted((models.masked.config.id2label or {}).items())]
        return load_task(data, load_exported_tokenizer(models.folder), classes)
    except (UserError, ValueError, OSError) as error:
        return f"the run's data cannot be read: {' '.join(str(error).split())}"


def _predict(task: Task, runner: Runner, examples: Sequence[Example]) -> dict[str, Tensor]:
    """What the task keeps of each example; one at a time, so that nothing is padding."""
    model = _as_model(runner, task.problem == "question_answering")
    with torch.no_grad():
        parts = [task.evaluation.predict(model, task.collate([example])) for example in examples]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _as_model(runner: Runner, spans: bool) -> Callable[..., Any]:
    """A runner as what a task's evaluation calls."""

    def model(**inputs: Tensor) -> Any:
        logits = runner(inputs)
        return SimpleNamespace(start_logits=logits[..., 0], end_logits=logits[..., 1], logits=logits)

    def plain(**inputs: Tensor) -> Any:
        return SimpleNamespace(logits=runner(inputs))

    return model if spans else plain


def with_types(runner: Runner) -> Runner:
    """For files that ask for token types also where a task has none."""

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        return runner({"token_type_ids": torch.zeros_like(inputs["input_ids"]), **inputs})

    return run
