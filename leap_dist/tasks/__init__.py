"""Tasks by name: `load_task(data, tokenizer)` gives tokenised examples, collation and metrics."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from leap_dist.config import DataConfig
from leap_dist.errors import UserError
from leap_dist.tasks import builtin, glue
from leap_dist.tasks.base import Collator, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Collator", "Task", "load_task", "needs_tokenizer", "task_names"]


def task_names() -> tuple[str, ...]:
    """Every name that `data.task` takes."""
    return (*builtin.NAMES, *glue.NAMES)


def needs_tokenizer(task_name: str) -> bool:
    """Whether the task is made of text; `UserError` for a task that does not exist."""
    if task_name in builtin.NAMES:
        return False
    if task_name in glue.NAMES:
        return True
    near = get_close_matches(task_name, task_names(), n=3, cutoff=0.4)
    suggestion = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UserError(f'data.task: got "{task_name}"; allowed: {", ".join(task_names())}{suggestion}')


def load_task(data: DataConfig, tokenizer: PreTrainedTokenizerBase | None) -> Task:
    """The task that `data` names. Text tasks need the model's tokenizer; builtin ones take None."""
    if not needs_tokenizer(data.task):
        return builtin.load(data)
    if tokenizer is None:
        raise UserError(f'data.task: got "{data.task}", a text task; it needs a model with a tokenizer (model.name)')
    return glue.load(data, tokenizer)
