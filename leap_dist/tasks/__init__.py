"""Tasks by name: `load_task(data, tokenizer)` gives tokenised examples, collation and evaluation."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from leap_dist.config.sections import DataConfig, names_files
from leap_dist.errors import UserError, few_of
from leap_dist.tasks import builtin, glue, lm, squad
from leap_dist.tasks.base import Collator, Problem, Task
from leap_dist.tasks.files import files_of
from leap_dist.tasks.tables import split_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Collator", "Task", "load_task", "metric_names", "needs_tokenizer", "problem_of", "task_names"]

logger = logging.getLogger(__name__)

TEXT_TASKS = {**dict.fromkeys(glue.NAMES, glue.load), **dict.fromkeys(squad.NAMES, squad.load)}
TEXT_TASKS |= dict.fromkeys(lm.NAMES, lm.load)


def task_names() -> tuple[str, ...]:
    """Every name that `data.task` takes."""
    return (*builtin.NAMES, *TEXT_TASKS)


def needs_tokenizer(task_name: str) -> bool:
    """Whether the task is made of text; `UserError` for a task that does not exist."""
    if task_name in builtin.NAMES:
        return False
    if task_name in TEXT_TASKS:
        return True
    near = get_close_matches(task_name, task_names(), n=3, cutoff=0.4)
    suggestion = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UserError(f'data.task: got "{task_name}"; allowed: {", ".join(task_names())}{suggestion}')


def problem_of(task_name: str) -> Problem:
    """What a model is asked for in the task; `UserError` for a task that does not exist."""
    needs_tokenizer(task_name)
    if task_name in squad.NAMES:
        return "question_answering"
    if task_name in lm.NAMES:
        return "masked_lm" if task_name == lm.MASKED else "causal_lm"
    known = glue.GLUE.get(task_name)
    return "regression" if known is not None and not known.label_names else "single_label_classification"


def metric_names(task_name: str, data: DataConfig) -> tuple[str, ...]:
    """What the task reports, the metric that tables show first; `UserError` for a task that does not exist.

    data: leaves out what these settings rule out. Not all do: whether rows are conversations only they can say.
    """
    if not needs_tokenizer(task_name):
        return "accuracy", "loss"
    if task_name in squad.NAMES:
        return "f1", "exact_match", "loss"
    if task_name in lm.NAMES:
        chats = len(data.text or ()) > 1
        return "perplexity", *(["bits_per_byte"] if task_name == lm.CAUSAL and not chats else []), "accuracy", "loss"
    known = glue.GLUE.get(task_name)
    names = *(known.metrics if known else ("accuracy",)), "loss"
    others = known.validation[1:] if known and not (data.train or data.dataset) else ()
    return *names, *(f"{split}_{name}" for split in others for name in names)


def load_task(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase | None, classes: Sequence[str] | None = None
) -> Task:
    """The task that `data` names. Text tasks need a tokenizer, the model's; builtin ones take None.

    classes: those of a model that was trained on the task and is judged now, by their ids. Where `data` says what it is
    judged on, what it was trained on is not read; the result's `train` has no meaning then.
    """
    if not needs_tokenizer(data.task):
        return builtin.load(data)
    if tokenizer is None:
        raise UserError(f'data.task: got "{data.task}", a text task; it needs a model with a tokenizer (model.name)')
    if classes is not None:
        data = _to_judge(data)
        if data.task in glue.NAMES:
            return glue.load(data, tokenizer, tuple(classes))
        if data.task in lm.NAMES:
            return lm.load(data, tokenizer, judge=True)
    else:
        _warn_of_shared(data)
    return TEXT_TASKS[data.task](data, tokenizer)


def _warn_of_shared(data: DataConfig) -> None:
    """Warn where examples are judged that are learned, too; on the first rank alone."""
    if os.environ.get("RANK", "0") != "0" or (data.dataset and names_files(data.validation)):
        return
    if data.dataset:
        (_, train), (_, validation) = split_names(data)
        shared = [f"the split {validation}"] if train == validation else []
    else:
        learned = {os.path.realpath(file) for file in files_of("data.train", data.train or ())}
        judged = files_of("data.validation", data.validation or ())
        shared = [str(file) for file in judged if os.path.realpath(file) in learned]
    if shared:
        logger.warning(
            "data.validation: %s: also in data.train, so the metrics say nothing of other data; give data of its own",
            few_of(shared),
        )


def _to_judge(data: DataConfig) -> DataConfig:
    """The section with validation in place of train, so that no other split and no other file is read."""
    if data.validation is not None and (data.dataset is None or names_files(data.validation)):
        return data.model_copy(update={"train": data.validation, "dataset": None, "streaming": False})
    return data.model_copy(update={"train": (split_names(data)[1][1],)}) if data.dataset else data
